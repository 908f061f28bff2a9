//! A linear map of the model: y = x·Wᵀ + b with W `[out, in]`.

use super::device::{ModelDevice, Products};
use super::product;
use crate::checkpoint::Checkpoint;
use crate::{Matrix, Result};
use candle_core::{DType, Device, Tensor};

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

    /// The same, kept as the products of `device` want it.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn on(device: &ModelDevice, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let weight = match device.products() {
            Products::Bf16 => weight.to_dtype(DType::BF16)?,
            Products::F32 | Products::Tf32 => weight,
        };
        Ok(Self { weight, bias })
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
        device: &ModelDevice,
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
        Self::on(device, weight, bias)
    }

    /// x·Wᵀ + b for `x [n, in]`; the result is `[n, out]`.
    ///
    /// # Errors
    /// A tensor error if `x` has other columns than W.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.without_bias(x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// x·Wᵀ, what a difference of inputs makes of outputs.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn without_bias(&self, x: &Tensor) -> Result<Tensor> {
        product::forward(x, &self.weight)
    }

    /// Carries `d = ∂L/∂y` `[n, out]` back to the input: d·W `[n, in]`.
    ///
    /// # Errors
    /// A tensor error if `d` has other columns than W rows.
    pub fn backward(&self, d: &Tensor) -> Result<Tensor> {
        product::backward(d, &self.weight)
    }

    /// W `[out, in]`, in bfloat16 where products are made of that.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// W `[out, in]` in f32, as it multiplies.
    ///
    /// # Errors
    /// A tensor error of the device.
    pub fn weight_f32(&self) -> Result<Tensor> {
        Ok(self.weight.to_dtype(DType::F32)?)
    }

    /// The same linear with another weight of the same shape.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let weight = tensor_from_matrix(weight, self.weight.device())?;
        Ok(Self {
            weight: weight.to_dtype(self.weight.dtype())?,
            bias: self.bias.clone(),
        })
    }
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
