//! Hidden states in memory or, past a budget, in a file that has no name; on a GPU in its memory first.
//!
//! Where a state lies changes no bit of it: all places keep f32. The file is gone with the process,
//! however that ends.

mod host_memory;

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use host_memory::HostMemory;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

const F32: u64 = 4;

/// Where hidden states are kept.
#[derive(Debug)]
pub struct Store {
    /// Bytes that may still be kept on the device, where that has memory of its own.
    left_on_device: AtomicU64,
    /// Bytes that may still be kept in memory.
    left: AtomicU64,
    dir: PathBuf,
    device: Device,
    keeps_down_inputs: bool,
    file: OnceLock<File>,
    /// Bytes of the file that are given away.
    end: Mutex<u64>,
}

impl Store {
    /// At most `budget` bytes in memory, the rest in a file in `dir`; tensors are made on `device`.
    pub fn new(budget: u64, dir: &Path, device: &Device) -> Self {
        Self {
            left_on_device: AtomicU64::new(0),
            left: AtomicU64::new(budget),
            dir: dir.to_path_buf(),
            device: device.clone(),
            keeps_down_inputs: true,
            file: OnceLock::new(),
            end: Mutex::new(0),
        }
    }

    /// The same, with up to `budget` bytes kept in the memory of the device, before all else.
    #[must_use]
    pub fn on_device(mut self, budget: u64) -> Self {
        self.left_on_device = AtomicU64::new(budget);
        self
    }

    /// The same, for runs that make the inputs of `down_proj`, the widest states there are, again
    /// whenever they are wanted.
    #[must_use]
    pub fn without_down_inputs(mut self) -> Self {
        self.keeps_down_inputs = false;
        self
    }

    /// Whether inputs of `down_proj` are among what is kept.
    pub fn keeps_down_inputs(&self) -> bool {
        self.keeps_down_inputs
    }

    /// Everything in memory.
    pub fn in_memory(device: &Device) -> Self {
        Self::new(u64::MAX, Path::new("."), device)
    }

    /// Where tensors are made.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes that went into the file.
    pub fn bytes_on_disk(&self) -> u64 {
        *self.end.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Room for `n_rows` rows of at most `max_width` values.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be made; [`Error::Device`] if a GPU's driver does not lock the memory.
    pub fn place(&self, n_rows: usize, max_width: usize) -> Result<HiddenState> {
        let n_bytes = n_rows as u64 * max_width as u64 * F32;
        let take = |left: u64| left.checked_sub(n_bytes);
        let fits = |left: &AtomicU64| {
            let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
            taken.is_ok()
        };
        let place = if fits(&self.left_on_device) {
            Place::Device(None)
        } else if fits(&self.left) {
            Place::Memory(HostMemory::new(&self.device, n_rows * max_width)?)
        } else {
            Place::File(self.reserve(n_bytes)?)
        };
        Ok(HiddenState {
            n_rows,
            width: 0,
            place,
        })
    }

    fn reserve(&self, n_bytes: u64) -> Result<u64> {
        let mut end = self.end.lock().unwrap_or_else(|e| e.into_inner());
        if self.file.get().is_none() {
            let file = tempfile::tempfile_in(&self.dir);
            let file = file.map_err(|e| self.error("create a file for hidden states in", e))?;
            let _ = self.file.set(file);
        }
        let start = *end;
        *end += n_bytes;
        Ok(start)
    }

    fn file(&self) -> Result<&File> {
        let absent = || io::Error::from(io::ErrorKind::NotFound);
        self.file
            .get()
            .ok_or_else(|| self.error("open the file of hidden states in", absent()))
    }

    fn error(&self, action: &'static str, e: io::Error) -> Error {
        Error::io(&self.dir, action, e)
    }
}

/// Rows of one sample, `[n_rows, width]`.
#[derive(Debug)]
pub struct HiddenState {
    n_rows: usize,
    width: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(HostMemory),
    /// Once it is set.
    Device(Option<Tensor>),
    /// Where its bytes begin.
    File(u64),
}

impl HiddenState {
    /// Number of rows, one per token.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Values per row, as they were last set.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Copies some rows.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, store: &Store, rows: Range<usize>, target: &mut [f32]) -> Result<()> {
        let values = rows.start * self.width..rows.end * self.width;
        match &self.place {
            Place::Memory(data) => data.read(values, target)?,
            Place::Device(Some(tensor)) => {
                let rows = tensor.narrow(0, rows.start, rows.len())?;
                target.copy_from_slice(&rows.flatten_all()?.to_vec1::<f32>()?);
            }
            // Nothing was set yet, so no row has any width.
            Place::Device(None) => {}
            Place::File(start) => {
                let mut bytes = vec![0; target.len() * F32 as usize];
                let at = start + values.start as u64 * F32;
                let done = read_exact_at(store.file()?, &mut bytes, at);
                done.map_err(|e| store.error("read hidden states from", e))?;
                let (words, _) = bytes.as_chunks::<4>();
                for (value, word) in target.iter_mut().zip(words) {
                    *value = f32::from_le_bytes(*word);
                }
            }
        }
        Ok(())
    }

    /// Some rows as a tensor.
    ///
    /// # Errors
    /// As [`HiddenState::read`].
    pub fn rows(&self, store: &Store, rows: Range<usize>) -> Result<Tensor> {
        let shape = (rows.len(), self.width);
        match &self.place {
            Place::Device(Some(tensor)) => return Ok(tensor.narrow(0, rows.start, rows.len())?),
            Place::Memory(data) => {
                let values = rows.start * self.width..rows.end * self.width;
                return data.tensor(values, shape, &store.device);
            }
            Place::Device(None) | Place::File(_) => {}
        }
        let mut values = vec![0.0; rows.len() * self.width];
        self.read(store, rows, &mut values)?;
        Ok(Tensor::from_vec(values, shape, &store.device)?)
    }

    /// All rows as a tensor.
    ///
    /// # Errors
    /// As [`HiddenState::read`].
    pub fn all(&self, store: &Store) -> Result<Tensor> {
        self.rows(store, 0..self.n_rows)
    }

    /// Sets the rows from `start` on; rows of another width than before make all others void.
    ///
    /// # Errors
    /// [`Error::Io`], on a full disk too; a tensor error.
    pub fn set(&mut self, store: &Store, start: usize, rows: &Tensor) -> Result<()> {
        let (_, width) = rows.dims2()?;
        match &mut self.place {
            Place::Device(_) => return self.set_on_device(start, rows),
            Place::Memory(data) => {
                self.width = width;
                return data.set(self.n_rows * width, start * width, rows);
            }
            Place::File(_) => {}
        }
        let values: Vec<f32> = rows.flatten_all()?.to_vec1()?;
        self.write(store, start, width, &values)
    }

    /// As [`HiddenState::set`], from plain values.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(
        &mut self,
        store: &Store,
        start: usize,
        width: usize,
        values: &[f32],
    ) -> Result<()> {
        if matches!(self.place, Place::Device(_)) {
            let shape = (values.len() / width.max(1), width);
            let rows = Tensor::from_slice(values, shape, &store.device)?;
            return self.set_on_device(start, &rows);
        }
        self.width = width;
        match &mut self.place {
            Place::Device(_) => {}
            Place::Memory(data) => data.write(self.n_rows * width, start * width, values)?,
            Place::File(place) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let at = *place + (start * width) as u64 * F32;
                let done = write_all_at(store.file()?, &bytes, at);
                done.map_err(|e| store.error("write hidden states to", e))?;
            }
        }
        Ok(())
    }
}

impl HiddenState {
    /// As [`HiddenState::set`], where it lies on the device. Rows are copied: they may be a part of
    /// something larger, which would be kept with them.
    fn set_on_device(&mut self, start: usize, rows: &Tensor) -> Result<()> {
        let (_, width) = rows.dims2()?;
        let Place::Device(place) = &mut self.place else {
            return Ok(());
        };
        self.width = width;
        let whole = match place {
            Some(whole) if whole.dims() == [self.n_rows, width] => whole,
            _ => {
                let shape = (self.n_rows, width);
                place.insert(Tensor::zeros(shape, rows.dtype(), rows.device())?)
            }
        };
        Ok(whole.slice_set(&rows.contiguous()?, 0, start)?)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_read(bytes, at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                bytes = &mut bytes[n..];
                at += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        let n = file.seek_write(bytes, at)?;
        bytes = &bytes[n..];
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_the_same_on_the_device_in_memory_and_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        // The first of three states fits on the device, the second in memory, the third in neither.
        let store = Store::new(5 * 8 * 4, dir.path(), &Device::Cpu).on_device(5 * 8 * 4);
        let mut states = [0; 3].map(|_| store.place(5, 8).unwrap());
        assert_eq!(store.bytes_on_disk(), 160);
        assert!(matches!(states[0].place, Place::Device(_)));
        assert!(matches!(states[1].place, Place::Memory(_)));
        for width in [3usize, 8, 1] {
            let values: Vec<f32> = (0..5 * width).map(|v| v as f32 - 0.1).collect();
            for state in &mut states {
                for start in [2usize, 0, 4] {
                    let n = 2.min(5 - start);
                    let rows = &values[start * width..(start + n) * width];
                    state.write(&store, start, width, rows).unwrap();
                }
                let found: Vec<f32> = state
                    .all(&store)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                assert_eq!(found, values);
                let part = state.rows(&store, 1..4).unwrap();
                assert_eq!(part.dims(), [3, width]);
                let mut read = vec![0.0; 3 * width];
                state.read(&store, 1..4, &mut read).unwrap();
                assert_eq!(read, values[width..4 * width]);
            }
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "the file has no name"
        );
    }
}
