//! Memory of the host that a GPU copies from and to by itself.

use super::{bind, failed, place_of, told};
use crate::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Tensor};
use cudarc::driver::{CudaStream, result};
use std::ops::Range;
use std::sync::Arc;

/// Page-locked numbers. Copies are work of the GPU's stream, and so in order with all other; who looks
/// at the numbers from here waits for it.
#[derive(Debug)]
pub(crate) struct PageLocked {
    stream: Arc<CudaStream>,
    first: *mut f32,
    len: usize,
}

// SAFETY: it owns what it points at, and gives it out by the rules of borrowing alone; what the GPU does
// with it is waited for before.
unsafe impl Send for PageLocked {}
// SAFETY: as before.
unsafe impl Sync for PageLocked {}

impl PageLocked {
    /// `len` zeros for tensors of `device`.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver does not lock as much.
    pub(crate) fn zeros(device: &CudaDevice, len: usize) -> Result<Self> {
        let stream = device.cuda_stream();
        let n_bytes = len.max(1) * size_of::<f32>();
        let action =
            format!("lock {n_bytes} bytes of memory for it, of which --memory gives it less");
        bind(&stream)?;
        // SAFETY: the memory is set below, and freed once, when this is dropped.
        let first = unsafe { result::malloc_host(n_bytes, 0) };
        let first = first.map_err(|e| failed(&stream, &action, told(&e)))?;
        let first = first.cast::<f32>();
        // SAFETY: there are as many bytes, nobody else knows of them, and zeros are numbers.
        unsafe { first.write_bytes(0, len.max(1)) };
        Ok(Self { stream, first, len })
    }

    /// The numbers, when all work before is done.
    ///
    /// # Errors
    /// [`Error::Device`], of the work before.
    pub(crate) fn values(&self) -> Result<&[f32]> {
        self.wait()?;
        // SAFETY: there are as many, all of them set; the GPU is through with them, and is given work
        // that changes them by `&mut self` alone.
        Ok(unsafe { std::slice::from_raw_parts(self.first, self.len) })
    }

    /// The numbers, to be changed, when all work before is done.
    ///
    /// # Errors
    /// As [`PageLocked::values`].
    pub(crate) fn values_mut(&mut self) -> Result<&mut [f32]> {
        self.wait()?;
        // SAFETY: as there; the GPU reads them for work that is done.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.first, self.len) })
    }

    /// A copy of some as a tensor of this shape on `device`.
    ///
    /// # Errors
    /// A tensor error if there is no room; [`Error::Device`].
    pub(crate) fn tensor(
        &self,
        values: Range<usize>,
        shape: (usize, usize),
        device: &Device,
    ) -> Result<Tensor> {
        assert!(values.start <= values.end && values.end <= self.len);
        assert_eq!(values.len(), shape.0 * shape.1, "all of the tensor is set");
        // SAFETY: all of it is set below, in the order of the stream.
        let tensor = unsafe { Tensor::empty(shape, DType::F32, device)? };
        bind(&self.stream)?;
        let to = place_of(&tensor, &self.stream)?;
        // SAFETY: `values` are some of the numbers, which stay there while the stream is not through.
        let from =
            unsafe { std::slice::from_raw_parts(self.first.add(values.start), values.len()) };
        let stream = self.stream.cu_stream();
        // SAFETY: the tensor has as much room; whoever changes the numbers waits for the copy.
        let done = unsafe { result::memcpy_htod_async(to.0, from, stream) };
        done.map_err(|e| failed(&self.stream, "copy to it", told(&e)))?;
        Ok(tensor)
    }

    /// Sets the numbers from `start` on to those of a contiguous tensor.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn set(&mut self, start: usize, rows: &Tensor) -> Result<()> {
        let n = rows.elem_count();
        assert!(start + n <= self.len, "there is room");
        bind(&self.stream)?;
        let from = place_of(rows, &self.stream)?;
        // SAFETY: as many numbers are there, which nobody looks at before the copy is done.
        let to = unsafe { std::slice::from_raw_parts_mut(self.first.add(start), n) };
        let stream = self.stream.cu_stream();
        // SAFETY: the tensor's memory is given back in the order of the stream.
        let done = unsafe { result::memcpy_dtoh_async(to, from.0, stream) };
        done.map_err(|e| failed(&self.stream, "copy from it", told(&e)))
    }

    fn wait(&self) -> Result<()> {
        bind(&self.stream)?;
        let done = self.stream.synchronize();
        done.map_err(|e| failed(&self.stream, "wait for the work before", told(&e)))
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        // Where the device has failed the run ends with that error; nothing is left to tell here.
        let _ = self.wait();
        // SAFETY: the memory is the driver's, and nobody points at it any more.
        let _ = unsafe { result::free_host(self.first.cast()) };
    }
}
