//! The products that a linear is: x·Wᵀ forward, d·W backward.
//!
//! W in f32 multiplies in f32. W in bfloat16 has the other factor rounded to bfloat16 as well, with
//! sums and results in f32: on a GPU by its tensor cores, elsewhere as these would.

use crate::Result;
#[cfg(feature = "cuda")]
use crate::gpu::Bf16Product;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows up to which a product is bound by reading the weight.
const FEW_ROWS: usize = 64;
/// Rows below which the tensor library's product of a part is the faster one.
const FEWEST_ROWS: usize = 4;
/// Rows of the weight that one thread reads at a time.
const PART_ROWS: usize = 128;

/// x·Wᵀ for `x [n, in]` and W `[out, in]`; the result is `[n, out]`.
///
/// # Errors
/// A tensor error if shapes disagree.
pub(super) fn forward(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(match (weight.dtype(), x.device()) {
        #[cfg(feature = "cuda")]
        (DType::BF16, Device::Cuda(_)) => Bf16Product::Forward.of(x, weight)?,
        (DType::BF16, _) => rounded(x)?.matmul(&weight.to_dtype(DType::F32)?.t()?)?,
        (_, Device::Cpu) => by_parts(x, weight)?,
        _ => x.matmul(&weight.t()?)?,
    })
}

/// d·W for `d [n, out]`; the result is `[n, in]`.
///
/// # Errors
/// A tensor error if shapes disagree.
pub(super) fn backward(d: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(match (weight.dtype(), d.device()) {
        #[cfg(feature = "cuda")]
        (DType::BF16, Device::Cuda(_)) => Bf16Product::Backward.of(d, weight)?,
        (DType::BF16, _) => rounded(d)?.matmul(&weight.to_dtype(DType::F32)?)?,
        _ => d.matmul(weight)?,
    })
}

/// Rounded to bfloat16, in f32.
fn rounded(x: &Tensor) -> candle_core::Result<Tensor> {
    x.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

/// x·Wᵀ. A product with few rows is bound by reading W, which the tensor library's product leaves to one
/// thread, or shares among threads that wait for each other; here parts of W are read side by side. How
/// they are cut does not depend on the threads, so that results do not either.
fn by_parts(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let (n, out) = (x.dim(0)?, weight.dim(0)?);
    if n > FEW_ROWS || out <= PART_ROWS {
        return x.matmul(&weight.t()?);
    }
    let parts = (0..out.div_ceil(PART_ROWS)).into_par_iter().map(|part| {
        let start = part * PART_ROWS;
        let rows = weight.narrow(0, start, PART_ROWS.min(out - start))?;
        match n < FEWEST_ROWS {
            true => x.matmul(&rows.t()?),
            false => by_one_thread(x, &rows),
        }
    });
    Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)
}

/// x·Wᵀ on the thread that asks.
fn by_one_thread(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let ((n, cols), out) = (x.dims2()?, weight.dim(0)?);
    let (x_storage, x_layout) = x.storage_and_layout();
    let (w_storage, w_layout) = weight.storage_and_layout();
    let places = x_layout
        .contiguous_offsets()
        .zip(w_layout.contiguous_offsets());
    let (Storage::Cpu(CpuStorage::F32(x)), Storage::Cpu(CpuStorage::F32(w)), Some((in_x, in_w))) =
        (&*x_storage, &*w_storage, places)
    else {
        return x.matmul(&weight.t()?);
    };
    let x = MatRef::from_row_major_slice(&x[in_x.0..in_x.1], n, cols);
    let w = MatRef::from_row_major_slice(&w[in_w.0..in_w.1], out, cols);
    let mut y = vec![0.0; n * out];
    let rows = MatMut::from_row_major_slice_mut(&mut y, n, out);
    matmul(rows, Accum::Replace, x, w.transpose(), 1.0, Par::Seq);
    Tensor::from_vec(y, (n, out), weight.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(rows: usize, cols: usize) -> Tensor {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let values = (0..rows * cols).map(value).collect();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
    }

    fn rows(x: &Tensor) -> Vec<Vec<f32>> {
        x.to_dtype(DType::F32).unwrap().to_vec2().unwrap()
    }

    /// Holds x·Wᵀ against sums in f64 of the factors as they are.
    fn check(y: &Tensor, x: &Tensor, w: &Tensor) {
        let (y, x, w) = (rows(y), rows(x), rows(w));
        for (y, x) in y.iter().zip(&x) {
            for (y, w) in y.iter().zip(&w) {
                let pairs = x.iter().zip(w);
                let sum: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(*y) - sum).abs() < 1e-4);
            }
        }
    }

    /// As many rows as fall on each side of every bound, and weights that no part divides.
    #[test]
    fn products_with_few_rows_are_the_same_products() {
        for out in [PART_ROWS, PART_ROWS + 1, 3 * PART_ROWS - 5] {
            let w = tensor(out, 33);
            for n in [1, FEWEST_ROWS - 1, FEWEST_ROWS, FEW_ROWS, FEW_ROWS + 1] {
                let x = tensor(n + 2, 33).narrow(0, 1, n).unwrap();
                check(&forward(&x, &w).unwrap(), &x, &w);
            }
        }
    }

    /// Factors are rounded, sums and results are not.
    #[test]
    fn bf16_rounds_both_factors_and_nothing_else() {
        let (w, n) = (tensor(70, 33).to_dtype(DType::BF16).unwrap(), 9);
        let x = (tensor(n, 33) / 3.0).unwrap();
        let x_rounded = x.to_dtype(DType::BF16).unwrap();
        assert_ne!(rows(&x), rows(&x_rounded));
        let y = forward(&x, &w).unwrap();
        assert_eq!(y.dtype(), DType::F32);
        check(&y, &x_rounded, &w);
        let d = (tensor(n, 70) / 3.0).unwrap();
        let back = backward(&d, &w).unwrap();
        check(&back, &d.to_dtype(DType::BF16).unwrap(), &w.t().unwrap());
    }
}
