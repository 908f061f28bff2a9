//! Statistics, factor and solution on a GPU.
//!
//! The same numbers as [`crate::statistics`] and [`crate::solver`] make, by the same formulas; what
//! is large is done by kernels of ours (`cuda/kernels`), by cuBLAS and by cuSOLVER, and what is
//! decided from it (order of columns, dampings, α) by the code of the CPU. Beside the order of
//! sums nothing differs, so codes are the same but where a weight lies within rounding of a tie.
//!
//! ```text
//! sums.rs      √ω u → H, C, S            weigh_rows, then SYRK or GEMM
//! factor.rs    H → order, R, D, P        fill_reversed, then POTRF; TRSM for P
//! target.rs    C, S → W + α E H⁻¹        GEMM and TRSM
//! solve.rs     W → codes                 fit_grids; solve_block, then GEMM, block after block
//! ```
//! All of it speaks to a [`Gpu`], which has memory, launches kernels and multiplies matrices:
//! CUDA's with the feature `cuda`; in tests an emulation that runs the same kernels on the CPU.
//! Statistics leave the GPU when they are complete: they are what ranks exchange, and two copies
//! over the bus cost less than a twentieth of summing them up.

pub(crate) mod array;
#[cfg(any(test, feature = "cuda"))]
mod bf16_product;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
pub(crate) mod emulated;
mod factor;
mod kernels;
mod products;
mod solve;
mod sums;
mod target;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use bf16_product::Bf16Product;
#[cfg(feature = "cuda")]
pub(crate) use cuda::PageLocked;
pub(crate) use factor::{Factor, Unfactored};
pub(crate) use solve::{check, loss_of, solve};
pub(crate) use sums::{Kept, Sums, TensorBatch};

use crate::{Error, Result};
use array::{Memory, Place};
use candle_core::{Device, Tensor};
use std::fmt::Debug;
use std::sync::Arc;

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// An array, or none.
    Place(Option<Place>),
    /// A `size_t`.
    Size(usize),
    /// An `int`.
    Int(i32),
    /// A `float`.
    Float(f32),
    /// A `double`.
    Double(f64),
}

impl Argument {
    /// As it is handed to a kernel, which reads as many bytes of the word as it knows of.
    #[cfg(any(test, feature = "cuda"))]
    fn word(self) -> u64 {
        match self {
            Self::Place(place) => place.map_or(0, |place| place.0),
            Self::Size(size) => size as u64,
            Self::Int(int) => u64::from(int.cast_unsigned()),
            Self::Float(float) => u64::from(float.to_bits()),
            Self::Double(double) => double.to_bits(),
        }
    }
}

/// c ← `alpha` · op(a) op(b) + `beta` · c as BLAS means it: columns of a matrix lie one after the
/// other, `c` is `[m, n]`, and op transposes where it is told to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub(crate) is_transposed: [bool; 2],
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) a: (Place, usize),
    pub(crate) b: (Place, usize),
    pub(crate) beta: f32,
    pub(crate) c: (Place, usize),
    /// Whether a and b are bfloat16; c and the sums are f32 either way.
    pub(crate) is_bf16: bool,
}

/// b ← op(a)⁻¹ b as BLAS means it, `a [m, m]` unit lower triangular, `b [m, n]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trsm {
    pub(crate) is_transposed: bool,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) a: (Place, usize),
    pub(crate) b: (Place, usize),
}

/// A device with memory of its own, which takes work in order.
pub(crate) trait Gpu: Debug + Send + Sync {
    /// What it is, for the report.
    fn name(&self) -> &str;

    /// Bytes of its memory that nobody has.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn free_bytes(&self) -> Result<u64>;

    /// Zeros.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    fn allocate(&self, n_bytes: usize) -> Result<Memory>;

    /// Copies `bytes` to the beginning of `to`, which has as much room.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn write(&self, to: &Memory, bytes: &[u8]) -> Result<()>;

    /// Copies from the beginning of `from`, which holds as much, when all work before is done.
    ///
    /// # Errors
    /// [`Error::Device`], of the work before as well.
    fn read(&self, from: &Memory, bytes: &mut [u8]) -> Result<()>;

    /// Where a tensor's numbers lie.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not one of contiguous f32 on this device.
    fn place(&self, tensor: &Tensor) -> Result<Place>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// `arguments` are those of the kernel in number, order and type, and what it reads and writes
    /// through them is there.
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn launch(
        &self,
        kernel: &'static str,
        n_blocks: u32,
        n_threads: u32,
        arguments: &[Argument],
    ) -> Result<()>;

    /// # Safety
    /// The matrices are there.
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn gemm(&self, call: Gemm) -> Result<()>;

    /// The upper triangle of c `[n, n]` += a aᵀ, a `[n, k]`, as BLAS means it.
    ///
    /// # Safety
    /// As [`Gpu::gemm`].
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn syrk_upper(&self, n: usize, k: usize, a: Place, c: Place) -> Result<()>;

    /// c `[n, m]` ← a b, `a [n, n]` symmetric and read in its upper triangle only, as BLAS means it.
    ///
    /// # Safety
    /// As [`Gpu::gemm`].
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn symm_upper(&self, n: usize, m: usize, a: Place, b: Place, c: Place) -> Result<()>;

    /// # Safety
    /// As [`Gpu::gemm`].
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn trsm(&self, call: Trsm) -> Result<()>;

    /// The upper triangle of a `[n, n]` ← U with UᵀU = a, as LAPACK means it; `Err` of the inner
    /// result is the index of the first pivot that is not positive.
    ///
    /// # Safety
    /// As [`Gpu::gemm`].
    ///
    /// # Errors
    /// [`Error::Device`].
    unsafe fn potrf_upper(&self, n: usize, a: Place) -> Result<std::result::Result<(), usize>>;
}

/// The GPU that tensors of `device` lie on; `None` for the CPU.
///
/// # Errors
/// [`Error::Device`] if it cannot be had; [`Error::Unsupported`] for a device of another kind.
pub(crate) fn of_device(device: &Device) -> Result<Option<Arc<dyn Gpu>>> {
    match device {
        Device::Cpu => Ok(None),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Some(Arc::new(cuda::Cuda::new(device)?))),
        _ => Err(Error::Unsupported {
            what: "this device; cpu, and with the feature `cuda` cuda:N, are supported".into(),
        }),
    }
}

/// The CUDA device of this number; with `tf32` the tensor library rounds the factors of its products.
///
/// # Errors
/// [`Error::Device`] if there is none; [`Error::Unsupported`] in a program without CUDA.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_device(ordinal: usize, tf32: bool) -> Result<Device> {
    cuda::open(ordinal, tf32)
}

/// As with the feature: there are none.
#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda_device(ordinal: usize, _tf32: bool) -> Result<Device> {
    let what = format!(
        "--device cuda:{ordinal} by this program, which was built without the feature `cuda`; see \
         docs/cuda.md"
    );
    Err(Error::Unsupported { what })
}
