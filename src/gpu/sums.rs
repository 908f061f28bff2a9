//! Second moments summed up on a GPU: [`crate::statistics`] tells what they are.
//!
//! H in f32 is SYRK's, half of the work of a product. For inputs in bf16 there is no such routine:
//! H is made in bands of rows, each up to its own diagonal, which is 9/16 of the square's work on
//! the tensor cores. Either way sums are in f32, and batches are added in the order they come in.

use super::array::Array;
use super::kernels::{Weighed, clear_upper, count_not_finite, weigh_rows};
use super::products::{View, product};
use super::{Gemm, Gpu};
use crate::statistics::{
    Statistics, StatisticsDtype, Sums as HostSums, check_weights, weight_power_sum,
};
use crate::{Error, Result};
use candle_core::Tensor;
use std::sync::Arc;

/// Bands that H of bf16 inputs is made in.
const N_BANDS: usize = 8;

/// What is summed up of a linear's inputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) in_features: usize,
    /// Whether C is.
    pub(crate) with_cross: bool,
    /// Rows of S, where it is.
    pub(crate) out_features: Option<usize>,
    pub(crate) dtype: StatisticsDtype,
}

/// As [`crate::statistics::Batch`], of tensors on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorBatch<'a> {
    /// `[n_tokens, in]`.
    pub(crate) u: &'a Tensor,
    /// `[n_tokens, in]`, given exactly when C is kept.
    pub(crate) f: Option<&'a Tensor>,
    /// `[n_tokens, out]`, given exactly when S is kept.
    pub(crate) output_drift: Option<&'a Tensor>,
    pub(crate) weights: Option<&'a [f32]>,
}

/// Sums on the GPU.
#[derive(Debug)]
pub(crate) struct Sums {
    gpu: Arc<dyn Gpu>,
    kept: Kept,
    hessian: Array<f32>,
    cross: Option<Array<f32>>,
    output_cross: Option<Array<f32>>,
    n_tokens: u64,
    weight_sum: f64,
    weight_square_sum: f64,
}

/// Weighted inputs of a batch, in the types that they are multiplied in.
struct Inputs {
    single: Option<Array<f32>>,
    half: Option<Array<u16>>,
}

impl Sums {
    /// Nothing summed up yet.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub(crate) fn new(gpu: &Arc<dyn Gpu>, kept: Kept) -> Result<Self> {
        let n = kept.in_features;
        let cross = kept.with_cross.then(|| Array::zeros(gpu, n * n));
        let output_cross = kept.out_features.map(|out| Array::zeros(gpu, out * n));
        Ok(Self {
            gpu: gpu.clone(),
            kept,
            hessian: Array::zeros(gpu, n * n)?,
            cross: cross.transpose()?,
            output_cross: output_cross.transpose()?,
            n_tokens: 0,
            weight_sum: 0.0,
            weight_square_sum: 0.0,
        })
    }

    /// Adds a batch of tokens.
    ///
    /// # Errors
    /// As [`Statistics::add_batch`], [`Error::Device`] beside. The sums are unchanged where the batch
    /// was at fault.
    pub(crate) fn add(&mut self, module: &str, batch: &TensorBatch<'_>) -> Result<()> {
        let n_tokens = self.check(module, batch)?;
        let TensorBatch { u, f, weights, .. } = *batch;
        let roots: Option<Vec<f32>> = weights.map(|w| w.iter().map(|w| w.sqrt()).collect());
        let roots = roots
            .map(|roots| Array::of(&self.gpu, &roots))
            .transpose()?;
        let roots = roots.as_ref();
        let is_half = self.kept.dtype == StatisticsDtype::Bf16;
        let types = (!is_half || self.output_cross.is_some(), is_half);
        let x = self.inputs(u, None, roots, types)?;
        if let (Some(_), Some(f)) = (&self.cross, f) {
            let residual = self.inputs(f, Some(u), roots, (!is_half, is_half))?;
            self.add_cross(&x, &residual, n_tokens)?;
        }
        self.add_hessian(&x, n_tokens)?;
        if let Some((out, drift)) = self.kept.out_features.zip(batch.output_drift) {
            self.add_output_cross(&x, drift, roots, [n_tokens, out])?;
        }
        self.n_tokens += n_tokens as u64;
        self.weight_sum += weight_power_sum(weights, n_tokens, 1);
        self.weight_square_sum += weight_power_sum(weights, n_tokens, 2);
        Ok(())
    }

    /// √ω (x − minus).
    fn inputs(
        &self,
        x: &Tensor,
        minus: Option<&Tensor>,
        roots: Option<&Array<f32>>,
        (with_single, with_half): (bool, bool),
    ) -> Result<Inputs> {
        let (rows, cols) = x.dims2()?;
        let gpu = &*self.gpu;
        let minus = minus.map(|minus| gpu.place(minus)).transpose()?;
        let sources = [Some(gpu.place(x)?), minus];
        let mut inputs = Inputs {
            single: with_single
                .then(|| Array::zeros(&self.gpu, rows * cols))
                .transpose()?,
            half: with_half
                .then(|| Array::zeros(&self.gpu, rows * cols))
                .transpose()?,
        };
        if let Some(single) = &mut inputs.single {
            weigh_rows(gpu, Weighed::F32(single), sources, roots, [rows, cols])?;
        }
        if let Some(half) = &mut inputs.half {
            weigh_rows(gpu, Weighed::Bf16(half), sources, roots, [rows, cols])?;
        }
        Ok(inputs)
    }

    /// The lower triangle of H += xᵀx; what lies above it is of no meaning until the end.
    fn add_hessian(&mut self, x: &Inputs, n_tokens: usize) -> Result<()> {
        let n = self.kept.in_features;
        if n_tokens == 0 {
            return Ok(());
        }
        match (&x.half, &x.single) {
            (Some(half), _) => {
                let height = n.div_ceil(N_BANDS);
                for start in (0..n).step_by(height) {
                    let end = n.min(start + height);
                    let band = self.half_product(
                        [n_tokens, end, end - start],
                        [(half, 0), (half, start)],
                        self.hessian.at(start * n),
                    );
                    // SAFETY: the band's columns end at its diagonal, within H.
                    unsafe { self.gpu.gemm(band)? };
                }
                Ok(())
            }
            (None, Some(single)) => {
                let (x, hessian) = (single.place(), self.hessian.place());
                // SAFETY: x is [n_tokens, n], H [n, n].
                unsafe { self.gpu.syrk_upper(n, n_tokens, x, hessian) }
            }
            (None, None) => Ok(()),
        }
    }

    /// C += residualᵀ x.
    fn add_cross(&mut self, x: &Inputs, residual: &Inputs, n_tokens: usize) -> Result<()> {
        let (n, Some(cross)) = (self.kept.in_features, &self.cross) else {
            return Ok(());
        };
        if let (Some(x), Some(residual)) = (&x.half, &residual.half) {
            if n_tokens == 0 {
                return Ok(());
            }
            let places = [(x, 0), (residual, 0)];
            let call = self.half_product([n_tokens, n, n], places, cross.place());
            // SAFETY: both are [n_tokens, n], C [n, n].
            return unsafe { self.gpu.gemm(call) };
        }
        if let (Some(x), Some(residual)) = (&x.single, &residual.single) {
            let out = View::all(cross, n, n);
            let left = (View::all(residual, n_tokens, n), true);
            return product(&*self.gpu, out, left, View::all(x, n_tokens, n), (1.0, 1.0));
        }
        Ok(())
    }

    /// S += driftᵀ x, always in f32: some channels of the stream are far larger than the rest.
    fn add_output_cross(
        &mut self,
        x: &Inputs,
        drift: &Tensor,
        roots: Option<&Array<f32>>,
        [n_tokens, out]: [usize; 2],
    ) -> Result<()> {
        let drift = self.inputs(drift, None, roots, (true, false))?;
        let n = self.kept.in_features;
        match (&self.output_cross, &x.single, &drift.single) {
            (Some(sum), Some(x), Some(drift)) => {
                let left = (View::all(drift, n_tokens, out), true);
                let right = View::all(x, n_tokens, n);
                product(&*self.gpu, View::all(sum, out, n), left, right, (1.0, 1.0))
            }
            _ => Ok(()),
        }
    }

    /// out += leftᵀ right of rows of bf16, where `right` has the first `m` of their columns, `left`
    /// `n` from its own first on, and rows of `out` are as long as H's.
    fn half_product(
        &self,
        [k, m, n]: [usize; 3],
        [right, left]: [(&Array<u16>, usize); 2],
        out: super::array::Place,
    ) -> Gemm {
        let stride = self.kept.in_features;
        Gemm {
            is_transposed: [false, true],
            m,
            n,
            k,
            alpha: 1.0,
            a: (right.0.at(right.1), stride),
            b: (left.0.at(left.1), stride),
            beta: 1.0,
            c: (out, stride),
            is_bf16: true,
        }
    }

    /// All that was summed up, which leaves the GPU.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn finish(mut self, module: &str) -> Result<Statistics> {
        let n = self.kept.in_features;
        clear_upper(&*self.gpu, &mut self.hessian, n)?;
        let cross = self.cross.as_ref().map(|c| c.matrix(module, n, n));
        let sums = self.output_cross.as_ref().zip(self.kept.out_features);
        let output_cross = sums.map(|(sums, out)| sums.matrix(module, out, n));
        Ok(Statistics::of_sums(HostSums {
            hessian_lower: self.hessian.matrix(module, n, n)?,
            cross: cross.transpose()?,
            output_cross: output_cross.transpose()?,
            dtype: self.kept.dtype,
            n_tokens: self.n_tokens,
            weight_sum: self.weight_sum,
            weight_square_sum: self.weight_square_sum,
        }))
    }

    /// The number of tokens, if everything is there and as it should be.
    fn check(&self, module: &str, batch: &TensorBatch<'_>) -> Result<usize> {
        let (n_tokens, _) = batch.u.dims2()?;
        let n = self.kept.in_features;
        let with_f = self.kept.with_cross.then_some(n);
        let companions = [
            ("inputs of the quantized stream", Some(batch.u), Some(n)),
            ("inputs of the full-precision stream", batch.f, with_f),
            (
                "drift of the output",
                batch.output_drift,
                self.kept.out_features,
            ),
        ];
        for (name, given, wanted) in companions {
            match (given, wanted) {
                (Some(tensor), Some(width)) => {
                    self.check_tensor(module, name, tensor, [n_tokens, width])?;
                }
                (None, None) => {}
                (None, Some(_)) => {
                    return Err(Error::Missing {
                        what: format!("the {name}"),
                        place: format!("a batch of {module}, whose cross moments are kept"),
                    });
                }
                (Some(_), None) => {
                    return Err(Error::Invalid {
                        what: format!("a batch of {module}"),
                        why: format!("{name} given, but no cross moments of it are kept"),
                    });
                }
            }
        }
        check_weights(module, n_tokens, batch.weights)?;
        Ok(n_tokens)
    }

    fn check_tensor(
        &self,
        module: &str,
        name: &str,
        tensor: &Tensor,
        expected: [usize; 2],
    ) -> Result<()> {
        if tensor.dims() != expected {
            return Err(Error::Shape {
                module: module.to_owned(),
                expected: expected.to_vec(),
                found: tensor.dims().to_vec(),
            });
        }
        let mut count = Array::zeros(&self.gpu, 1)?;
        let place = self.gpu.place(tensor)?;
        count_not_finite(&*self.gpu, &mut count, place, tensor.elem_count())?;
        match count.values()?[..] {
            [0] => Ok(()),
            [ref count, ..] => Err(Error::NotFinite {
                module: module.to_owned(),
                stage: name.to_owned(),
                count: *count as usize,
            }),
            [] => Ok(()),
        }
    }
}
