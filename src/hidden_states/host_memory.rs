//! Hidden states in the host's memory. For a GPU that is page-locked: the GPU then copies by itself, at
//! the bus's rate and in its stream, where it would wait for copies of pages otherwise.

use crate::Result;
#[cfg(feature = "cuda")]
use crate::gpu::PageLocked;
use candle_core::{CpuStorage, Device, Storage, Tensor};
use std::ops::Range;

/// Numbers of one state.
#[derive(Debug)]
pub(super) enum HostMemory {
    /// As many as were last asked for.
    Pageable(Vec<f32>),
    /// Room for as many as there can be.
    #[cfg(feature = "cuda")]
    PageLocked(PageLocked),
}

impl HostMemory {
    /// Room for up to `len` numbers, for tensors of `device`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if a GPU's driver does not lock as much.
    pub(super) fn new(device: &Device, len: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return Ok(Self::PageLocked(PageLocked::zeros(device, len)?));
        }
        // Pages are taken when they are written to.
        let _ = (device, len);
        Ok(Self::Pageable(Vec::new()))
    }

    /// Copies some of the numbers.
    ///
    /// # Errors
    /// [`crate::Error::Device`], of work before that a GPU has not done.
    pub(super) fn read(&self, values: Range<usize>, target: &mut [f32]) -> Result<()> {
        match self {
            Self::Pageable(data) => target.copy_from_slice(&data[values]),
            #[cfg(feature = "cuda")]
            Self::PageLocked(data) => target.copy_from_slice(&data.values()?[values]),
        }
        Ok(())
    }

    /// Some of the numbers as a tensor on `device`.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory; [`crate::Error::Device`].
    pub(super) fn tensor(
        &self,
        values: Range<usize>,
        shape: (usize, usize),
        device: &Device,
    ) -> Result<Tensor> {
        match self {
            Self::Pageable(data) => Ok(Tensor::from_slice(&data[values], shape, device)?),
            #[cfg(feature = "cuda")]
            Self::PageLocked(data) => data.tensor(values, shape, device),
        }
    }

    /// Sets numbers from `start` on of `len` in all.
    ///
    /// # Errors
    /// As [`HostMemory::read`].
    pub(super) fn write(&mut self, len: usize, start: usize, values: &[f32]) -> Result<()> {
        let place = match self {
            Self::Pageable(data) => {
                data.resize(len, 0.0);
                &mut data[..]
            }
            #[cfg(feature = "cuda")]
            Self::PageLocked(data) => data.values_mut()?,
        };
        place[start..][..values.len()].copy_from_slice(values);
        Ok(())
    }

    /// As [`HostMemory::write`], from a tensor.
    ///
    /// # Errors
    /// A tensor error; as [`HostMemory::read`].
    pub(super) fn set(&mut self, len: usize, start: usize, rows: &Tensor) -> Result<()> {
        let rows = rows.contiguous()?;
        #[cfg(feature = "cuda")]
        if let Self::PageLocked(data) = self {
            return data.set(start, &rows);
        }
        let (storage, layout) = rows.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(values)), Some((first, end))) => {
                self.write(len, start, &values[first..end])
            }
            _ => self.write(len, start, &rows.flatten_all()?.to_vec1::<f32>()?),
        }
    }
}
