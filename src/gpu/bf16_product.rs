//! Products of linears in bfloat16 on a GPU: the tensor library has such products with results in
//! bfloat16 too, which would round every output; these are f32, as the sums are.

use super::Gemm;
use super::array::Place;

/// Which product with a weight W `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bf16Product {
    /// x·Wᵀ, x `[n, in]`.
    Forward,
    /// d·W, d `[n, out]`.
    Backward,
}

impl Bf16Product {
    /// Columns of the left factor, and of the result.
    fn widths(self, [out, inp]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Forward => [inp, out],
            Self::Backward => [out, inp],
        }
    }

    /// The product of `n` rows as BLAS means it, which sees every matrix transposed: what lies row after
    /// row is to it columns one after the other.
    fn call(self, n: usize, shape: [usize; 2], [x, w, y]: [Place; 3]) -> Gemm {
        let [k, width] = self.widths(shape);
        Gemm {
            is_transposed: [self == Self::Forward, false],
            m: width,
            n,
            k,
            alpha: 1.0,
            a: (w, shape[1]),
            b: (x, k),
            beta: 0.0,
            c: (y, width),
            is_bf16: true,
        }
    }
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::super::cuda::{gemm_on, place_in};
    use super::{Bf16Product, Place};
    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    use candle_core::{
        CpuStorage, CudaStorage, CustomOp2, DType, Error, Layout, Result, Shape, Tensor,
    };
    use half::bf16;

    impl Bf16Product {
        /// With `left` in f32, which is rounded, and `weight` in bfloat16; the result is f32.
        ///
        /// # Errors
        /// A tensor error if shapes disagree; one of the device.
        pub(crate) fn of(self, left: &Tensor, weight: &Tensor) -> Result<Tensor> {
            let left = left.to_dtype(DType::BF16)?.contiguous()?;
            left.apply_op2_no_bwd(&weight.contiguous()?, &self)
        }
    }

    impl CustomOp2 for Bf16Product {
        fn name(&self) -> &'static str {
            "a product of bfloat16"
        }

        fn cpu_fwd(
            &self,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            Err(Error::Msg(format!("{} is a GPU's", self.name())))
        }

        fn cuda_fwd(
            &self,
            x: &CudaStorage,
            x_layout: &Layout,
            w: &CudaStorage,
            w_layout: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let device = x.device().clone();
            let (n, cols) = x_layout.shape().dims2()?;
            let (out, inp) = w_layout.shape().dims2()?;
            let [k, width] = self.widths([out, inp]);
            if cols != k {
                let why = format!("{} of {cols} columns with [{out}, {inp}]", self.name());
                return Err(Error::Msg(why));
            }
            // SAFETY: the product sets all of it before anybody reads.
            let y = unsafe { device.alloc::<f32>(n * width)? };
            if n > 0 {
                let places = [place(x, x_layout)?, place(w, w_layout)?, {
                    let (place, _) = y.device_ptr(y.stream());
                    Place(place)
                }];
                let call = self.call(n, [out, inp], places);
                // SAFETY: all three are there in these shapes, on this device.
                unsafe { gemm_on(&device.cublas_handle(), call) }.map_err(Error::msg)?;
            }
            Ok((CudaStorage::wrap_cuda_slice(y, device), (n, width).into()))
        }
    }

    fn place(storage: &CudaStorage, layout: &Layout) -> Result<Place> {
        let wrong = || Error::Msg("rows that are not contiguous bfloat16".into());
        place_in::<bf16>(storage, layout).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::super::array::Array;
    use super::super::emulated;
    use super::*;
    use half::bf16;

    /// As the routine is called, on an emulation of BLAS, beside the definition.
    #[test]
    fn blas_is_asked_for_the_products_of_a_linear() {
        let Some(gpu) = emulated::gpu() else { return };
        let (n, shape) = (5, [7, 3]);
        let number = |i: usize| bf16::from_f32(((i * 29 % 61) as f32 - 30.0) / 8.0);
        let array = |len: usize| -> Vec<bf16> { (0..len).map(number).collect() };
        let bits = |values: &[bf16]| -> Vec<u16> { values.iter().map(|v| v.to_bits()).collect() };
        let w = array(shape[0] * shape[1]);
        let at = |row: usize, col: usize| w[row * shape[1] + col].to_f32();
        let w_there = Array::of(&gpu, &bits(&w)).unwrap();
        for product in [Bf16Product::Forward, Bf16Product::Backward] {
            let [k, width] = product.widths(shape);
            let x = array(n * k);
            let x_there = Array::of(&gpu, &bits(&x)).unwrap();
            let y = Array::<f32>::zeros(&gpu, n * width).unwrap();
            let places = [x_there.place(), w_there.place(), y.place()];
            // SAFETY: all three are there in these shapes.
            unsafe { gpu.gemm(product.call(n, shape, places)).unwrap() };
            let y = y.values().unwrap();
            for row in 0..n {
                for col in 0..width {
                    let term = |i: usize| {
                        let w = match product {
                            Bf16Product::Forward => at(col, i),
                            Bf16Product::Backward => at(i, col),
                        };
                        x[row * k + i].to_f32() * w
                    };
                    let expected: f32 = (0..k).map(term).sum();
                    assert!(
                        (y[row * width + col] - expected).abs() < 1e-4,
                        "{product:?}"
                    );
                }
            }
        }
    }
}
