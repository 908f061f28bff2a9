//! A linear map of the model: y = x·Wᵀ + b with W `[out, in]`.

use crate::checkpoint::Checkpoint;
use crate::{Matrix, Result};
use candle_core::{CpuStorage, Device, Storage, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows up to which a product is bound by reading the weight.
const FEW_ROWS: usize = 64;
/// Rows below which the tensor library's product of a part is the faster one.
const FEWEST_ROWS: usize = 4;
/// Rows of the weight that one thread reads at a time.
const PART_ROWS: usize = 128;

/// A linear with its weight `[out, in]` and, where the architecture has one, its bias `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// A linear of given tensors, `weight [out, in]` and `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Reads `module.weight`, plain or packed, and `module.bias` if `has_bias`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear_weight`] and [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        module: &str,
        shape: [usize; 2],
        has_bias: bool,
        device: &Device,
    ) -> Result<Self> {
        let weight = checkpoint.linear_weight(module, shape[0], shape[1])?;
        let weight = Tensor::from_vec(weight.into_vec(), &shape, device)?;
        let bias = match has_bias {
            true => Some(load_tensor(
                checkpoint,
                &format!("{module}.bias"),
                &shape[..1],
                device,
            )?),
            false => None,
        };
        Ok(Self { weight, bias })
    }

    /// x·Wᵀ + b for `x [n, in]`; the result is `[n, out]`.
    ///
    /// # Errors
    /// A tensor error if `x` has other columns than W.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(x, &self.weight)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// W `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The same linear with another weight of the same shape.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let weight = tensor_from_matrix(weight, self.weight.device())?;
        Ok(Self {
            weight,
            bias: self.bias.clone(),
        })
    }
}

/// x·Wᵀ. A product with few rows is bound by reading W, which the tensor library's product leaves to one
/// thread, or shares among threads that wait for each other; here parts of W are read side by side. How
/// they are cut does not depend on the threads, so that results do not either.
fn product(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let (n, out) = (x.dim(0)?, weight.dim(0)?);
    if n > FEW_ROWS || out <= PART_ROWS || !x.device().is_cpu() {
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

/// Reads a tensor of the given shape as f32.
///
/// # Errors
/// Those of [`Checkpoint::load`].
pub fn load_tensor(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
    device: &Device,
) -> Result<Tensor> {
    Ok(Tensor::from_vec(
        checkpoint.load(name, shape)?,
        shape,
        device,
    )?)
}

/// A rank-2 f32 tensor as a matrix.
///
/// # Errors
/// A tensor error if `tensor` is not of rank 2 and f32.
pub fn matrix_from_tensor(tensor: &Tensor) -> Result<Matrix> {
    let (rows, cols) = tensor.dims2()?;
    Matrix::from_vec("tensor", rows, cols, tensor.flatten_all()?.to_vec1()?)
}

/// A matrix as a rank-2 f32 tensor.
///
/// # Errors
/// A tensor error if the device refuses the memory.
pub fn tensor_from_matrix(matrix: Matrix, device: &Device) -> Result<Tensor> {
    let shape = (matrix.rows(), matrix.cols());
    Ok(Tensor::from_vec(matrix.into_vec(), shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many rows as fall on each side of every bound, and weights that no part divides.
    #[test]
    fn products_with_few_rows_are_the_same_products() {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let tensor = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(value).collect();
            Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        for out in [PART_ROWS, PART_ROWS + 1, 3 * PART_ROWS - 5] {
            let linear = Linear::new(tensor(out, 33), Some(tensor(1, out).squeeze(0).unwrap()));
            for n in [1, FEWEST_ROWS - 1, FEWEST_ROWS, FEW_ROWS, FEW_ROWS + 1] {
                let whole = tensor(n + 2, 33);
                let x = whole.narrow(0, 1, n).unwrap();
                let y = matrix_from_tensor(&linear.forward(&x).unwrap()).unwrap();
                let (x, w) = (
                    matrix_from_tensor(&x).unwrap(),
                    matrix_from_tensor(linear.weight()).unwrap(),
                );
                for row in 0..n {
                    for col in 0..out {
                        let pairs = x.row(row).iter().zip(w.row(col));
                        let sum: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let expected = sum + f64::from(value(col));
                        assert!((f64::from(y.row(row)[col]) - expected).abs() < 1e-4);
                    }
                }
            }
        }
    }
}
