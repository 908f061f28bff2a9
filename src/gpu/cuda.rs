//! CUDA's GPUs: memory and launches through the driver, products by cuBLAS, the factorization by
//! cuSOLVER, all in the one stream that the tensors' work is in.
//!
//! Kernels are compiled by NVRTC when the first is launched, for what the GPU is.

mod page_locked;

pub(crate) use page_locked::PageLocked;

use super::array::{Memory, Place};
use super::kernels::{NAMES, SOURCE};
use super::{Argument, Gemm, Gpu, Trsm};
use crate::{Error, Result};
use candle_core::cuda_backend::{CudaDType, CudaDevice, set_gemm_reduced_precision_f32};
use candle_core::{CudaStorage, Device, Layout, Storage, Tensor};
use cudarc::cublas::sys::{
    cublasComputeType_t, cublasDiagType_t, cublasFillMode_t, cublasGemmAlgo_t, cublasGemmEx,
    cublasOperation_t, cublasSideMode_t, cublasSsymm_v2, cublasSsyrk_v2, cublasStrsm_v2,
    cudaDataType,
};
use cudarc::cusolver::safe::DnHandle;
use cudarc::cusolver::sys as cusolver;
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, result};
use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex};

/// One GPU.
pub(super) struct Cuda {
    /// As on the command line, and the product's name.
    name: String,
    stream: Arc<CudaStream>,
    blas: Arc<cudarc::cublas::CudaBlas>,
    solver: Mutex<DnHandle>,
    /// Compiled when the first is launched.
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
}

impl Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// What the tensors of `cuda:ordinal` are made on: one stream for all threads.
///
/// # Errors
/// [`Error::Device`] if there is no such GPU, or no driver.
pub(super) fn open(ordinal: usize, tf32: bool) -> Result<Device> {
    let name = format!("cuda:{ordinal}");
    let failed = |why: String| Error::Device {
        device: name.clone(),
        action: "open it".into(),
        why,
    };
    let n_devices = CudaContext::device_count().map_err(|e| failed(told(&e)))?;
    let n_devices = usize::try_from(n_devices).unwrap_or(0);
    if ordinal >= n_devices {
        return Err(failed(format!("{n_devices} GPUs found, numbered from 0")));
    }
    set_gemm_reduced_precision_f32(tf32);
    let device = CudaDevice::new_with_stream(ordinal).map_err(|e| failed(e.to_string()))?;
    // SAFETY: all work, of tensors and of ours, is in this stream, which keeps its order.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// An error in words. Without a driver there is nobody to ask for more than its number.
fn told(error: &result::DriverError) -> String {
    use cudarc::driver::sys::CUresult;
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => "no GPU found".into(),
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "no driver found: libcuda is the one for linking, without functions".into()
        }
        other => format!("{other:?}"),
    }
}

/// The kernels, compiled for GPUs of this compute capability.
fn compile((major, minor): (i32, i32)) -> std::result::Result<Ptx, String> {
    let options = CompileOptions {
        fmad: Some(false),
        options: vec![format!("--gpu-architecture=compute_{major}{minor}")],
        name: Some("kernels.cu".into()),
        ..Default::default()
    };
    compile_ptx_with_opts(SOURCE, options).map_err(|e| format!("{e:?}"))
}

impl Cuda {
    /// The GPU that tensors of `device` lie on.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(super) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let product = context.name();
        let product = product.map_err(|e| failed(&stream, "ask it what it is", told(&e)))?;
        let solver = DnHandle::new(stream.clone());
        let solver = solver.map_err(|e| failed(&stream, "open cuSOLVER", format!("{e:?}")))?;
        Ok(Self {
            name: format!("cuda:{} ({product})", context.ordinal()),
            blas: device.cublas_handle(),
            solver: Mutex::new(solver),
            functions: Mutex::default(),
            stream,
        })
    }

    fn function(&self, kernel: &'static str) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        if functions.is_empty() {
            let failed = |e: result::DriverError| self.failed("load kernels", told(&e));
            let context = self.stream.context();
            let ptx = compile(context.compute_capability().map_err(failed)?);
            let ptx = ptx.map_err(|why| self.failed("compile kernels for it", why))?;
            let module = context.load_module(ptx).map_err(failed)?;
            for name in NAMES {
                functions.insert(name, module.load_function(name).map_err(failed)?);
            }
        }
        let function = functions.get(kernel).cloned();
        function.ok_or_else(|| self.failed("launch", format!("no kernel {kernel}")))
    }

    fn failed(&self, action: &str, why: String) -> Error {
        failed(&self.stream, action, why)
    }

    fn bind(&self) -> Result<()> {
        bind(&self.stream)
    }

    fn index(&self, n: usize) -> Result<c_int> {
        index(n).map_err(|why| self.failed("multiply matrices", why))
    }

    /// What cuBLAS said.
    fn blas_done(&self, action: &str, status: cudarc::cublas::sys::cublasStatus_t) -> Result<()> {
        status
            .result()
            .map_err(|e| self.failed(action, format!("{:?}", e.0)))
    }

    fn solver_done(&self, action: &str, status: cusolver::cusolverStatus_t) -> Result<()> {
        status
            .result()
            .map_err(|e| self.failed(action, format!("{:?}", e.0)))
    }

    fn bytes(&self, n_bytes: usize) -> Result<CudaSlice<u8>> {
        let slice = self.stream.alloc_zeros::<u8>(n_bytes);
        slice.map_err(|e| {
            let why = match self.stream.context().mem_get_info() {
                Ok((free, _)) => format!("{}, {free} bytes are free", told(&e)),
                Err(_) => told(&e),
            };
            self.failed(&format!("give {n_bytes} bytes of memory"), why)
        })
    }
}

fn operation(is_transposed: bool) -> cublasOperation_t {
    match is_transposed {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    }
}

/// Makes the GPU of this stream that of this thread, which libraries expect.
fn bind(stream: &CudaStream) -> Result<()> {
    let bound = stream.context().bind_to_thread();
    bound.map_err(|e| failed(stream, "use it", told(&e)))
}

fn failed(stream: &CudaStream, action: &str, why: String) -> Error {
    Error::Device {
        device: format!("cuda:{}", stream.context().ordinal()),
        action: action.into(),
        why,
    }
}

fn index(n: usize) -> std::result::Result<c_int, String> {
    c_int::try_from(n).map_err(|_| format!("{n} is too many"))
}

/// Where the numbers lie; `None` if they are of another type or not contiguous.
pub(super) fn place_in<T: CudaDType>(storage: &CudaStorage, layout: &Layout) -> Option<Place> {
    let (start, _) = layout.contiguous_offsets()?;
    let values = storage.as_cuda_slice::<T>().ok()?;
    let (place, _) = values.device_ptr(values.stream());
    Some(Place(place + (start * size_of::<T>()) as u64))
}

/// Where a tensor's numbers lie.
///
/// # Errors
/// [`Error::Device`] if it is not one of contiguous f32 on a GPU.
fn place_of(tensor: &Tensor, stream: &CudaStream) -> Result<Place> {
    let (storage, layout) = tensor.storage_and_layout();
    let place = match &*storage {
        Storage::Cuda(storage) => place_in::<f32>(storage, layout),
        _ => None,
    };
    let wrong = || {
        failed(
            stream,
            "use a tensor",
            "not one of contiguous f32 on it".into(),
        )
    };
    place.ok_or_else(wrong)
}

/// The product by this handle, or why there is none.
///
/// # Safety
/// The matrices are there, on the handle's device.
pub(super) unsafe fn gemm_on(
    blas: &cudarc::cublas::CudaBlas,
    call: Gemm,
) -> std::result::Result<(), String> {
    let kind = match call.is_bf16 {
        true => cudaDataType::CUDA_R_16BF,
        false => cudaDataType::CUDA_R_32F,
    };
    let pointer = |place: Place| place.0 as *mut c_void;
    // SAFETY: the caller says that the matrices are there; the factors are read at once.
    let status = unsafe {
        cublasGemmEx(
            *blas.handle(),
            operation(call.is_transposed[0]),
            operation(call.is_transposed[1]),
            index(call.m)?,
            index(call.n)?,
            index(call.k)?,
            std::ptr::from_ref(&call.alpha).cast(),
            pointer(call.a.0),
            kind,
            index(call.a.1)?,
            pointer(call.b.0),
            kind,
            index(call.b.1)?,
            std::ptr::from_ref(&call.beta).cast(),
            pointer(call.c.0),
            cudaDataType::CUDA_R_32F,
            index(call.c.1)?,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    status.result().map_err(|e| format!("{:?}", e.0))
}

impl Gpu for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn free_bytes(&self) -> Result<u64> {
        let info = self.stream.context().mem_get_info();
        let (free, _) = info.map_err(|e| self.failed("ask for its memory", told(&e)))?;
        Ok(free as u64)
    }

    fn allocate(&self, n_bytes: usize) -> Result<Memory> {
        let slice = self.bytes(n_bytes)?;
        let (place, _) = slice.device_ptr(&self.stream);
        Ok(Memory {
            place: Place(place),
            n_bytes,
            _owner: Box::new(slice),
        })
    }

    fn write(&self, to: &Memory, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= to.n_bytes, "there is room");
        self.bind()?;
        // SAFETY: there is room, as asserted; the bytes are read before the call returns.
        let done = unsafe { result::memcpy_htod_async(to.place.0, bytes, self.stream.cu_stream()) };
        done.map_err(|e| self.failed("copy to it", told(&e)))
    }

    fn read(&self, from: &Memory, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.n_bytes, "as many are there");
        self.bind()?;
        // SAFETY: as many are there, as asserted; nobody sees `bytes` before the stream is through.
        let done =
            unsafe { result::memcpy_dtoh_async(bytes, from.place.0, self.stream.cu_stream()) };
        let done = done.and_then(|()| self.stream.synchronize());
        done.map_err(|e| self.failed("copy from it, after the work before", told(&e)))
    }

    fn place(&self, tensor: &Tensor) -> Result<Place> {
        place_of(tensor, &self.stream)
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        n_blocks: u32,
        n_threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        self.bind()?;
        let function = self.function(kernel)?;
        let words = arguments.iter().map(|argument| argument.word());
        let mut words: Vec<u64> = words.collect();
        let words = words.iter_mut();
        let mut pointers: Vec<*mut c_void> =
            words.map(|word| std::ptr::from_mut(word).cast()).collect();
        let (blocks, threads) = ((n_blocks, 1, 1), (n_threads, 1, 1));
        let stream = self.stream.cu_stream();
        // SAFETY: the caller answers for the arguments, which are read before the call returns.
        let done = unsafe {
            result::launch_kernel(
                function.cu_function(),
                blocks,
                threads,
                0,
                stream,
                &mut pointers,
            )
        };
        done.map_err(|e| self.failed(&format!("launch {kernel}"), told(&e)))
    }

    unsafe fn gemm(&self, call: Gemm) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller says that the matrices are there.
        let done = unsafe { gemm_on(&self.blas, call) };
        done.map_err(|why| self.failed("multiply matrices", why))
    }

    unsafe fn syrk_upper(&self, n: usize, k: usize, a: Place, c: Place) -> Result<()> {
        self.bind()?;
        let (n, k) = (self.index(n)?, self.index(k)?);
        // SAFETY: the caller says that the matrices are there.
        let status = unsafe {
            cublasSsyrk_v2(
                *self.blas.handle(),
                cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                cublasOperation_t::CUBLAS_OP_N,
                n,
                k,
                &1.0,
                a.0 as *const f32,
                n,
                &1.0,
                c.0 as *mut f32,
                n,
            )
        };
        self.blas_done("sum up squares", status)
    }

    unsafe fn symm_upper(&self, n: usize, m: usize, a: Place, b: Place, c: Place) -> Result<()> {
        self.bind()?;
        let (n, m) = (self.index(n)?, self.index(m)?);
        // SAFETY: the caller says that the matrices are there.
        let status = unsafe {
            cublasSsymm_v2(
                *self.blas.handle(),
                cublasSideMode_t::CUBLAS_SIDE_LEFT,
                cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                n,
                m,
                &1.0,
                a.0 as *const f32,
                n,
                b.0 as *const f32,
                n,
                &0.0,
                c.0 as *mut f32,
                n,
            )
        };
        self.blas_done("multiply with H", status)
    }

    unsafe fn trsm(&self, call: Trsm) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller says that the matrices are there.
        let status = unsafe {
            cublasStrsm_v2(
                *self.blas.handle(),
                cublasSideMode_t::CUBLAS_SIDE_LEFT,
                cublasFillMode_t::CUBLAS_FILL_MODE_LOWER,
                operation(call.is_transposed),
                cublasDiagType_t::CUBLAS_DIAG_UNIT,
                self.index(call.m)?,
                self.index(call.n)?,
                &1.0,
                call.a.0.0 as *const f32,
                self.index(call.a.1)?,
                call.b.0.0 as *mut f32,
                self.index(call.b.1)?,
            )
        };
        self.blas_done("solve with R", status)
    }

    unsafe fn potrf_upper(&self, n: usize, a: Place) -> Result<std::result::Result<(), usize>> {
        self.bind()?;
        let solver = self.solver.lock().unwrap_or_else(|e| e.into_inner());
        let (n, a) = (self.index(n)?, a.0 as *mut f32);
        let upper = cusolver::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
        let mut n_work: c_int = 0;
        // SAFETY: the caller says that the matrix is there.
        let status = unsafe {
            cusolver::cusolverDnSpotrf_bufferSize(solver.cu(), upper, n, a, n, &mut n_work)
        };
        self.solver_done("ask for the factor's room", status)?;
        let n_bytes = usize::try_from(n_work).unwrap_or(0) * size_of::<f32>();
        let work = self.allocate(n_bytes.max(1))?;
        let info = self.allocate(size_of::<c_int>())?;
        let (work_at, info_at) = (work.place.0 as *mut f32, info.place.0 as *mut c_int);
        // SAFETY: as before; there is as much room for the work as was asked for.
        let status = unsafe {
            cusolver::cusolverDnSpotrf(solver.cu(), upper, n, a, n, work_at, n_work, info_at)
        };
        self.solver_done("factor H", status)?;
        let mut bytes = [0; size_of::<c_int>()];
        self.read(&info, &mut bytes)?;
        match c_int::from_ne_bytes(bytes) {
            0 => Ok(Ok(())),
            pivot if pivot > 0 => Ok(Err(pivot as usize - 1)),
            wrong => Err(self.failed("factor H", format!("argument {} is wrong", -wrong))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC needs no GPU: what it makes of the source for several generations.
    #[test]
    fn kernels_compile_for_every_generation() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let ptx = compile(capability).unwrap().to_src();
            for name in NAMES {
                assert!(
                    ptx.contains(&format!(".entry {name}(")),
                    "{name} for {capability:?}"
                );
            }
            assert!(
                !ptx.contains("fma.rn.f64"),
                "no contraction for {capability:?}"
            );
        }
    }

    /// Without a GPU there is one error that says so.
    #[test]
    fn an_absent_gpu_is_an_error() {
        let error = open(9999, false).unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
        assert!(
            error.to_string().starts_with("cuda:9999: cannot open it: "),
            "{error}"
        );
    }
}
