//! Arrays in a GPU's memory.

use super::Gpu;
use crate::{Matrix, Result};
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// An address in a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) u64);

/// Some bytes of a GPU's memory, given back when it is dropped.
pub(crate) struct Memory {
    pub(crate) place: Place,
    pub(crate) n_bytes: usize,
    /// Gives it back.
    pub(crate) _owner: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:?}", self.n_bytes, self.place)
    }
}

/// What arrays hold: plain numbers, any bits of which are one.
pub(crate) trait Number: Copy + Default + 'static {}
impl Number for f32 {}
impl Number for f64 {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for i32 {}

/// Numbers in a GPU's memory.
#[derive(Debug)]
pub(crate) struct Array<T> {
    gpu: Arc<dyn Gpu>,
    memory: Memory,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Number> Array<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no room.
    pub(crate) fn zeros(gpu: &Arc<dyn Gpu>, len: usize) -> Result<Self> {
        // Nobody is given nothing: an address is wanted even of an array without numbers.
        let memory = gpu.allocate((len * size_of::<T>()).max(1))?;
        Ok(Self {
            gpu: gpu.clone(),
            memory,
            len,
            of: PhantomData,
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Array::zeros`].
    pub(crate) fn of(gpu: &Arc<dyn Gpu>, values: &[T]) -> Result<Self> {
        let array = Self::zeros(gpu, values.len())?;
        let n_bytes = size_of_val(values);
        // SAFETY: plain numbers have no padding, and are borrowed for as long as the bytes are.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), n_bytes) };
        gpu.write(&array.memory, bytes)?;
        Ok(array)
    }

    /// The numbers, when all work before is done.
    ///
    /// # Errors
    /// [`crate::Error::Device`], of the work before as well.
    pub(crate) fn values(&self) -> Result<Vec<T>> {
        let mut values = vec![T::default(); self.len];
        let n_bytes = size_of_val(&values[..]);
        // SAFETY: plain numbers have no padding, any bits are one, and nobody else borrows them.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), n_bytes) };
        self.gpu.read(&self.memory, bytes)?;
        Ok(values)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the first lies.
    pub(crate) fn place(&self) -> Place {
        self.memory.place
    }

    /// Where number `index` lies, which may be the one after the last.
    pub(crate) fn at(&self, index: usize) -> Place {
        assert!(index <= self.len, "the number is one of the array");
        Place(self.memory.place.0 + (index * size_of::<T>()) as u64)
    }
}

impl Array<f32> {
    /// Row after row of a matrix.
    ///
    /// # Errors
    /// As [`Array::zeros`].
    pub(crate) fn of_matrix(gpu: &Arc<dyn Gpu>, matrix: &Matrix) -> Result<Self> {
        Self::of(gpu, matrix.data())
    }

    /// A matrix of as many rows and columns as the array has numbers.
    ///
    /// # Errors
    /// As [`Array::values`]; [`crate::Error::Shape`] naming `name` if they are not as many.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        Matrix::from_vec(name, rows, cols, self.values()?)
    }
}
