//! Where sums, factors and solutions are made: on the CPU, or on the GPU that the model's tensors
//! lie on. Nothing goes from one to the other by itself: what a GPU does not do is refused before
//! any work, and what stays with the CPU is told by [`EngineReport`].

use crate::gpu::{self, Gpu};
use crate::model::{ModelDevice, ModelSource, Products};
use crate::plan::{Bits, Scheme};
use crate::recipe::Recipe;
use crate::solver::{self, HandedTriangle, Solved, SolverSettings};
use crate::statistics::Statistics;
use crate::{Error, Matrix, QuantizedWeight, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

/// A device as the command line has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// `cpu`.
    #[default]
    Cpu,
    /// `cuda:N`.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = text.strip_prefix("cuda:").map(str::parse);
        match (text, number) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err(Error::Invalid {
                what: "--device".into(),
                why: format!("{text:?} given, cpu, cuda or cuda:N expected, as cuda:0"),
            }),
        }
    }
}

impl DeviceName {
    /// The device that tensors are made on, and what its products are made of. Where these are not
    /// [`Products::F32`], all products of the tensor library are in TF32 for the whole process.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no such GPU; [`Error::Unsupported`] for one in a program without
    /// the feature `cuda`; [`Error::Invalid`] for products that the CPU does not have.
    pub fn open(self, products: Products) -> Result<ModelDevice> {
        let device = match (self, products) {
            (Self::Cpu, Products::F32) => Device::Cpu,
            (Self::Cpu, other) => {
                return Err(Error::Invalid {
                    what: "--products".into(),
                    why: format!("the CPU has none of {other}; --device cuda:N has"),
                });
            }
            (Self::Cuda(ordinal), _) => gpu::cuda_device(ordinal, products != Products::F32)?,
        };
        Ok(ModelDevice::new(device, products))
    }
}

/// Where the heavy work of a run is done.
#[derive(Clone, Debug)]
pub enum Engine {
    /// On all cores.
    Cpu,
    /// On one GPU.
    Gpu(OneGpu),
}

/// A GPU that is open.
#[derive(Clone, Debug)]
pub struct OneGpu {
    pub(crate) gpu: Arc<dyn Gpu>,
    /// Of the model's tensors there.
    pub(crate) products: Products,
}

/// What ran where, by the names under which the report tells seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineReport {
    /// The device: `cpu`, or `cuda:N` with the product's name.
    pub device: String,
    /// What a GPU's products of tensors round their factors to: `f32`, which is not at all, `tf32` or `bf16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub products: Option<String>,
    /// Whether inputs of `down_proj` were made again whenever they were wanted, rather than kept.
    #[serde(default)]
    pub remakes_inputs: bool,
    /// Stages on the GPU; empty without one.
    pub on_gpu: Vec<String>,
    /// Stages on the CPU beside it; empty without a GPU, where all are.
    pub on_cpu: Vec<String>,
}

/// Bytes of a GPU that are left to libraries, kernels and the tensors of a forward pass.
const RESERVE_BYTES: u64 = 3 << 30;

/// Squares of the widest linear that sums, factor and solution hold at once at most: H, C, a
/// part's both, R and what it is made in.
const N_SQUARES: u64 = 6;

/// Matrices as large as the largest weight that a solution holds at once.
const N_WEIGHTS: u64 = 8;

impl Engine {
    /// That of tensors on `device`.
    ///
    /// # Errors
    /// [`Error::Device`] if the GPU cannot be used; [`Error::Unsupported`] for a device of a kind
    /// that none is for.
    pub fn of(device: &ModelDevice) -> Result<Self> {
        let products = device.products();
        let gpu = gpu::of_device(device)?;
        Ok(gpu.map_or(Self::Cpu, |gpu| Self::Gpu(OneGpu { gpu, products })))
    }

    /// Whether the recipe can be done here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the first thing that a GPU does not do.
    pub fn check(&self, model: &ModelSource, recipe: &Recipe) -> Result<()> {
        if matches!(self, Self::Cpu) {
            return Ok(());
        }
        let missing = [
            (recipe.method.is_scaled(), "a search for scales (awq, mbq)"),
            (
                !recipe.needs_calibration(),
                "rounding to nearest alone (rtn)",
            ),
            (model.decoder().experts.is_some(), "a mixture of experts"),
            (matches!(recipe.bits(), Bits::Mean(_)), "a mean of bits"),
            (recipe.tuning().is_some(), "tuning of scales"),
        ];
        if let Some((_, what)) = missing.iter().find(|(is_asked, _)| *is_asked) {
            return Err(Error::Unsupported {
                what: format!("{what} on a GPU; --device cpu does it"),
            });
        }
        let modules = model.modules().into_iter();
        let mut schemes = modules.filter_map(|module| recipe.scheme_of(&module.name));
        schemes.try_for_each(|scheme| gpu::check(&recipe.solver, scheme))
    }

    /// What its results depend on, whichever GPU it is: what ranks must have alike.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Gpu(own) => format!("gpu, products in {}", own.products),
        }
    }

    /// What runs where; whether inputs of `down_proj` are made again, the caller knows.
    pub fn report(&self, remakes_inputs: bool) -> EngineReport {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        match self {
            Self::Cpu => EngineReport {
                device: "cpu".into(),
                products: None,
                remakes_inputs,
                on_gpu: Vec::new(),
                on_cpu: Vec::new(),
            },
            Self::Gpu(OneGpu { gpu, products }) => EngineReport {
                device: gpu.name().into(),
                products: Some(products.to_string()),
                remakes_inputs,
                on_gpu: names(&[
                    "vision",
                    "forward",
                    "importance",
                    "statistics",
                    "factor",
                    "solve",
                ]),
                // Rounding to nearest for the report, and reading and unpacking weights.
                on_cpu: names(&["check", "processor", "load", "report", "write"]),
            },
        }
    }

    /// Whether it is a GPU's.
    pub fn is_gpu(&self) -> bool {
        matches!(self, Self::Gpu(_))
    }

    /// Bytes of hidden states that fit beside a run's work into the GPU's memory, of which `limit` bytes are
    /// to be used at most; none without a GPU. What inputs of `down_proj` are made with takes room where they
    /// are not kept.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn state_bytes(
        &self,
        model: &ModelSource,
        keeps_down_inputs: bool,
        limit: Option<u64>,
    ) -> Result<u64> {
        let Self::Gpu(OneGpu { gpu, .. }) = self else {
            return Ok(0);
        };
        let shapes: Vec<[usize; 2]> = model.modules().iter().map(|m| m.shape).collect();
        let widest = shapes.iter().map(|[_, n]| *n as u64).max().unwrap_or(0);
        let largest = shapes.iter().map(|[out, n]| (out * n) as u64).max();
        let square = widest * widest;
        let n_weights = match keeps_down_inputs {
            true => N_WEIGHTS,
            // gate and up of both streams.
            false => N_WEIGHTS + 4,
        };
        let work = 4 * (N_SQUARES * square + n_weights * largest.unwrap_or(0));
        let room = limit.unwrap_or(u64::MAX).min(gpu.free_bytes()?);
        Ok(room.saturating_sub(work + RESERVE_BYTES))
    }
}

/// The factor of the Hessian that linears share, where it was made.
pub(crate) enum Factor {
    Cpu(Box<solver::Factor>),
    Gpu(Box<gpu::Factor>),
}

/// How a Hessian was damped.
#[derive(Clone, Debug)]
pub(crate) struct Damping {
    /// Dampings that failed, in order.
    pub(crate) tried: Vec<f64>,
    /// The one that worked.
    pub(crate) used: f64,
    /// Whether the Hessian is of the part of the samples that α is found with.
    pub(crate) of_part: bool,
}

/// Moments that are to be factored, where that will be.
pub(crate) enum Unfactored {
    Cpu(Box<solver::Unfactored>),
    Gpu(Box<gpu::Unfactored>),
}

impl Unfactored {
    /// As [`solver::Unfactored::new`].
    ///
    /// # Errors
    /// As there; [`Error::Device`].
    pub(crate) fn new(
        engine: &Engine,
        module: &str,
        statistics: Statistics,
        settings: &SolverSettings,
    ) -> Result<Self> {
        Ok(match engine {
            Engine::Cpu => {
                let moments = solver::Unfactored::new(module, statistics, settings)?;
                Self::Cpu(Box::new(moments))
            }
            Engine::Gpu(OneGpu { gpu, .. }) => {
                let moments = gpu::Unfactored::new(gpu, module, statistics, settings)?;
                Self::Gpu(Box::new(moments))
            }
        })
    }

    /// Makes the factor.
    ///
    /// # Errors
    /// As [`solver::Factor::new`]; [`Error::Device`].
    pub(crate) fn factor(self, module: &str, settings: &SolverSettings) -> Result<Factor> {
        Ok(match self {
            Self::Cpu(moments) => Factor::Cpu(Box::new(moments.factor(module, settings)?)),
            Self::Gpu(moments) => Factor::Gpu(Box::new(moments.factor(module, settings)?)),
        })
    }

    /// The factor, of what somebody else has made of the same moments.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn with_triangle(
        self,
        triangle: HandedTriangle,
        settings: &SolverSettings,
    ) -> Result<Factor> {
        Ok(match self {
            Self::Cpu(moments) => Factor::Cpu(Box::new(moments.with_triangle(triangle, settings))),
            Self::Gpu(moments) => Factor::Gpu(Box::new(moments.with_triangle(triangle, settings)?)),
        })
    }
}

impl Factor {
    /// The same, with α of each row found by how well what a part of the samples asks for serves the
    /// others; `part` is that part's.
    pub(crate) fn with_part(self, part: Self) -> Self {
        match (self, part) {
            (Self::Cpu(factor), Self::Cpu(part)) => {
                Self::Cpu(Box::new(factor.with_part_factor(*part)))
            }
            (Self::Gpu(factor), Self::Gpu(part)) => {
                Self::Gpu(Box::new(factor.with_part_factor(*part)))
            }
            _ => unreachable!("a rank has one engine"),
        }
    }

    /// What others need to have this factor who have its moments.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn triangle(&self) -> Result<HandedTriangle> {
        match self {
            Self::Cpu(factor) => Ok(factor.triangle()),
            Self::Gpu(factor) => factor.triangle(),
        }
    }

    /// As [`solver::gptq::solve_rows`]; on a GPU rows have the bits that they have when all are solved
    /// as far as its libraries' products do.
    ///
    /// # Errors
    /// As there; [`Error::Device`].
    pub(crate) fn solve(
        &self,
        module: &str,
        w: &Matrix,
        rows: Range<usize>,
        scheme: Scheme,
        settings: &SolverSettings,
    ) -> Result<Solved> {
        match self {
            Self::Cpu(factor) => {
                solver::gptq::solve_rows(module, w, rows, factor, scheme, settings)
            }
            Self::Gpu(factor) => gpu::solve(module, w, rows, factor, scheme, settings),
        }
    }

    /// tr((W − Q) H (W − Q)ᵀ).
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn loss(&self, w: &Matrix, q: &QuantizedWeight) -> Result<f64> {
        match self {
            Self::Cpu(factor) => Ok(solver::quantization_loss(w, q, factor.hessian_lower())),
            Self::Gpu(factor) => gpu::loss_of(w, q, factor),
        }
    }

    /// How it was damped, first of all samples, then of the part where there is one.
    pub(crate) fn dampings(&self) -> Vec<Damping> {
        let damping = |tried: &[f64], used: f64, of_part: bool| Damping {
            tried: tried.to_vec(),
            used,
            of_part,
        };
        match self {
            Self::Cpu(factor) => (factor.all())
                .map(|(f, of_part)| damping(&f.dampening_steps, f.dampening_frac, of_part))
                .collect(),
            Self::Gpu(factor) => (factor.all())
                .map(|(f, of_part)| damping(&f.dampening_steps, f.dampening_frac, of_part))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_on_the_command_line() {
        let name = |text: &str| text.parse::<DeviceName>();
        assert_eq!(name("cpu").unwrap(), DeviceName::Cpu);
        assert_eq!(name("cuda:3").unwrap(), DeviceName::Cuda(3));
        for bad in ["", "cuda", "cuda:", "cuda:-1", "cuda:x", "gpu:0", "CPU"] {
            assert!(matches!(name(bad), Err(Error::Invalid { .. })), "{bad}");
        }
    }
}
