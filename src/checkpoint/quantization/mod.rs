//! Reading of weights that are stored as codes, in any of the forms that [`crate::export`] writes
//! and other tools write too.
//!
//! | form | codes | scales | zero points |
//! |---|---|---|---|
//! | [compressed-tensors](CompressedTensors) | `weight_packed` | `weight_scale` | `weight_zero_point` |
//! | [GPTQ](Gptq), v1 and v2 | `qweight` | `scales` | `qzeros` |
//! | [AWQ](Awq), GEMM | `qweight` | `scales` | `qzeros` |
//! | [MLX](Mlx), affine | `weight` | `scales` | `biases` |
//! | [GGUF](Gguf), ours | `weight`, blocks of all three | | |
//!
//! One file each says how the tensors lie; all of them come out as a [`QuantizedWeight`].

mod awq;
mod columns;
mod compressed_tensors;
mod gguf;
mod gptq;
mod mlx;
mod words;

pub use awq::Awq;
pub use compressed_tensors::{CompressedTensors, QuantizationGroup};
pub use gguf::Gguf;
pub use gptq::Gptq;
pub use mlx::Mlx;

pub(crate) use awq::NIBBLE_OF_OUTPUT;
pub(crate) use compressed_tensors::name_in_memory;
pub(super) use gguf::Blocks;
pub(crate) use mlx::bias as mlx_bias;
pub(crate) use words::turned;

use super::{CONFIG_FILE, Checkpoint, DType};
use crate::plan::ScaleDtype;
use crate::{Error, Matrix, QuantizedWeight, Result};
use columns::Columns;
use serde_json::Value;
use std::path::Path;

/// How the weights of a folder are quantized, as its `config.json` says.
#[derive(Clone, Debug)]
pub enum Quantization {
    /// `quant_method: compressed-tensors`, `format: pack-quantized`.
    CompressedTensors(CompressedTensors),
    /// `quant_method: gptq`.
    Gptq(Gptq),
    /// `quant_method: awq`.
    Awq(Awq),
    /// A `quantization` object with `mode: affine`.
    Mlx(Mlx),
    /// Blocks in GGUF files.
    Gguf(Gguf),
}

/// The codes of a linear and, where its groups are not runs of columns, which column is where.
struct Packed {
    weight: QuantizedWeight,
    columns: Columns,
}

impl Quantization {
    /// Reads a model's configuration; `None` if it speaks of no quantization.
    pub(super) fn from_config(path: &Path, config: &Value) -> Result<Option<Self>> {
        let object = |key| config.get(key).filter(|v: &&Value| !v.is_null());
        let Some(found) = object("quantization_config") else {
            let mlx = object("quantization").map(|found| Mlx::from_config(path, found));
            return Ok(mlx.transpose()?.map(Self::Mlx));
        };
        let method = found.get("quant_method").unwrap_or(&Value::Null);
        Ok(Some(match method.as_str() {
            Some("compressed-tensors") => {
                Self::CompressedTensors(CompressedTensors::from_config(path, found)?)
            }
            Some("gptq") => Self::Gptq(Gptq::from_config(path, found)?),
            Some("awq") => Self::Awq(Awq::from_config(path, found)?),
            _ => {
                let what = format!(
                    "{}: quantization_config.quant_method is {method}; \"compressed-tensors\", \
                     \"gptq\" and \"awq\" are read",
                    path.display()
                );
                return Err(Error::Unsupported { what });
            }
        }))
    }

    /// What the form is called.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CompressedTensors(_) => "compressed-tensors",
            Self::Gptq(_) => "gptq",
            Self::Awq(_) => "awq",
            Self::Mlx(_) => "mlx",
            Self::Gguf(_) => "gguf",
        }
    }

    /// Last parts of the names of a quantized module's tensors, the codes' first.
    fn suffixes(&self) -> &'static [&'static str] {
        match self {
            Self::CompressedTensors(_) => &compressed_tensors::SUFFIXES,
            Self::Gptq(_) => &gptq::SUFFIXES,
            Self::Awq(_) => &awq::SUFFIXES,
            Self::Mlx(_) => &mlx::SUFFIXES,
            Self::Gguf(_) => &gguf::SUFFIXES,
        }
    }
}

impl Checkpoint {
    /// How the folder's weights are quantized, if they are.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// Whether the weight of this linear is stored as packed codes.
    pub fn is_quantized(&self, module: &str) -> bool {
        let Some(quantization) = &self.quantization else {
            return false;
        };
        let has = |suffix: &str| self.contains(&format!("{module}.{suffix}"));
        match quantization {
            // `weight` alone is what a plain weight is called too.
            Quantization::Mlx(_) => has("weight") && has("scales"),
            Quantization::Gguf(q) => q.contains(module),
            other => has(other.suffixes()[0]),
        }
    }

    /// The linear that `tensor` is a part of, if it is one of those that hold a quantized weight
    /// or look like it: its codes need not be there.
    pub fn packed_owner<'t>(&self, tensor: &'t str) -> Option<&'t str> {
        let quantization = self.quantization.as_ref()?;
        let (module, suffix) = tensor.rsplit_once('.')?;
        let is_part = quantization.suffixes().contains(&suffix);
        let is_plain = suffix == "weight" && !self.is_quantized(module);
        (is_part && !is_plain).then_some(module)
    }

    /// Bytes that the weight of a linear takes in the files, in whatever form it is stored.
    pub fn linear_n_bytes(&self, module: &str) -> Option<u64> {
        if self.is_quantized(module) {
            let suffixes = self.quantization()?.suffixes().iter();
            let parts = suffixes.filter_map(|part| self.info(&format!("{module}.{part}")));
            return Some(parts.map(|info| info.n_bytes as u64).sum());
        }
        let (dtype, shape) = self.linear_info(module)?;
        Some((shape.iter().product::<usize>() * dtype.n_bytes()) as u64)
    }

    /// Every quantized linear, by checkpoint name, sorted.
    pub fn quantized_modules(&self) -> Vec<String> {
        let owners = self.names().filter_map(|name| self.packed_owner(name));
        let mut modules: Vec<String> = owners
            .filter(|module| self.is_quantized(module))
            .map(str::to_owned)
            .collect();
        modules.dedup();
        modules
    }

    /// The codes, scales and zero points of a quantized linear, by checkpoint name.
    ///
    /// # Errors
    /// [`Error::Missing`] if a tensor or its format is absent; [`Error::Shape`] if a tensor's shape
    /// disagrees with the others and the format; [`Error::Format`] for a wrong element type or
    /// a spare bit that is not zero; [`Error::NotFinite`] for scales, and [`Error::Invalid`] if one
    /// is not positive; [`Error::Unsupported`] if its groups are not runs of neighbouring columns
    /// (`desc_act` without `static_groups`), which only [`Checkpoint::linear_weight`] can read.
    pub fn packed_module(&self, module: &str) -> Result<QuantizedWeight> {
        let packed = self.packed(module)?;
        match packed.columns {
            Columns::InOrder => Ok(packed.weight),
            Columns::Scattered(_) => Err(Error::Unsupported {
                what: format!(
                    "{module}: the columns of a group are not neighbours (desc_act); it can be \
                     read as numbers, but no other format holds these codes"
                ),
            }),
        }
    }

    /// The numbers `[out, in]` that a quantized linear stands for.
    pub(super) fn dequantized(&self, module: &str, out: usize, inp: usize) -> Result<Matrix> {
        let packed = self.packed(module)?;
        let found = [packed.weight.rows(), packed.weight.cols()];
        if found != [out, inp] {
            return Err(Error::Shape {
                module: module.to_owned(),
                expected: vec![out, inp],
                found: found.to_vec(),
            });
        }
        Ok(packed.columns.restore(packed.weight.dequantize()))
    }

    /// Type of the scales and shape `[out, in]` of a quantized linear.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Format`] if its tensors do not say.
    pub(super) fn packed_info(&self, module: &str) -> Result<(DType, Vec<usize>)> {
        let shape = match self.quantization() {
            Some(Quantization::CompressedTensors(_)) => {
                compressed_tensors::packed_shape(self, module)?
            }
            Some(Quantization::Gptq(q)) => q.shape(self, module)?,
            Some(Quantization::Awq(_)) => awq::shape(self, module)?,
            Some(Quantization::Mlx(q)) => q.shape(self, module)?,
            Some(Quantization::Gguf(q)) => return Ok((DType::F16, q.shape(self, module)?.into())),
            None => return Err(self.not_quantized(module)),
        };
        let scales = match self.quantization() {
            Some(Quantization::CompressedTensors(_)) => "weight_scale",
            _ => "scales",
        };
        let dtype = self.require_info(&format!("{module}.{scales}"))?.dtype;
        Ok((dtype, shape.to_vec()))
    }

    fn not_quantized(&self, module: &str) -> Error {
        Error::Missing {
            what: format!("a quantization of {module}"),
            place: self.dir().join(CONFIG_FILE).display().to_string(),
        }
    }

    fn packed(&self, module: &str) -> Result<Packed> {
        let in_order = |weight| Packed {
            weight,
            columns: Columns::InOrder,
        };
        match self.quantization() {
            Some(Quantization::CompressedTensors(q)) => q.read(self, module),
            Some(Quantization::Gptq(q)) => q.read(self, module),
            Some(Quantization::Awq(q)) => q.read(self, module).map(in_order),
            Some(Quantization::Mlx(q)) => q.read(self, module).map(in_order),
            Some(Quantization::Gguf(q)) => q.read(self, module).map(in_order),
            None => Err(self.not_quantized(module)),
        }
    }

    /// Storage type of a tensor of scales.
    fn scale_dtype(&self, name: &str) -> Result<ScaleDtype> {
        match self.require_info(name)?.dtype {
            DType::Bf16 => Ok(ScaleDtype::Bf16),
            DType::F16 => Ok(ScaleDtype::F16),
            DType::F32 => Ok(ScaleDtype::F32),
            other => {
                let why = format!("expected BF16, F16 or F32, found {}", other.name());
                Err(self.tensor_error(name, why))
            }
        }
    }

    /// The sides of a tensor that must be a matrix.
    fn matrix_shape(&self, name: &str) -> Result<[usize; 2]> {
        match self.require_info(name)?.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
            ref other => {
                let why = format!("expected two sides that are not zero, found {other:?}");
                Err(self.tensor_error(name, why))
            }
        }
    }
}

/// A key of a quantization's configuration, as an error says it.
fn bad_key(path: &Path, key: &str, expected: &str, found: Option<&Value>) -> Error {
    let found = found.unwrap_or(&Value::Null);
    Error::format(path, key, format!("expected {expected}, found {found}"))
}

/// `bits` of a configuration.
fn bits_of(path: &Path, config: &Value) -> Result<u8> {
    let found = config.get("bits");
    let bits = found.and_then(Value::as_u64).map(u8::try_from);
    match bits {
        Some(Ok(bits)) => Ok(bits),
        _ => Err(bad_key(path, "bits", "an integer", found)),
    }
}

/// `group_size` of a configuration; −1 is the whole row.
fn group_size_of(path: &Path, config: &Value) -> Result<Option<usize>> {
    let found = config.get("group_size");
    match found.and_then(Value::as_i64) {
        Some(-1) => Ok(None),
        Some(size) if size > 0 => Ok(Some(size as usize)),
        _ => Err(bad_key(path, "group_size", "-1 or more than 0", found)),
    }
}
