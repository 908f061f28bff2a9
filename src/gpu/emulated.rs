//! A GPU for tests: memory of the process, the real kernels compiled for the CPU
//! (`cuda/emulation`), and the products of BLAS as BLAS describes them.

use super::array::{Memory, Place};
use super::kernels::NAMES;
use super::{Argument, Gemm, Gpu, Trsm};
use crate::{Error, Result};
use candle_core::{CpuStorage, Storage, Tensor};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{
    solve_unit_lower_triangular_in_place, solve_unit_upper_triangular_in_place,
};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock};

type Emulate = unsafe extern "C" fn(*const c_char, c_uint, c_uint, *mut *mut c_void) -> c_int;

/// The kernels on the CPU.
#[derive(Debug)]
struct Emulated {
    library: &'static libloading::Library,
}

/// The emulation; `None`, with a word on stderr, where there is no C++ compiler.
///
/// One library serves all tests, which run side by side.
pub(crate) fn gpu() -> Option<Arc<dyn Gpu>> {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(build).as_ref()?;
    Some(Arc::new(Emulated { library }))
}

fn build() -> Option<libloading::Library> {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("libkernels.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/emulation/emulate.cpp");
    let flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        "-shared",
        "-fPIC",
        "-o",
    ];
    let mut compiler = Command::new("g++");
    let Ok(output) = compiler.args(flags).arg(&library).arg(source).output() else {
        eprintln!("no g++ here: kernels are not tested");
        return None;
    };
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the kernels do not compile:\n{told}"
    );
    // SAFETY: the library has no code that runs when it is loaded.
    Some(unsafe { libloading::Library::new(&library) }.unwrap())
}

fn failed(action: &str, why: &str) -> Error {
    Error::Device {
        device: "emulation".into(),
        action: action.into(),
        why: why.into(),
    }
}

/// A matrix of `rows` and `cols`, columns one after the other.
///
/// # Safety
/// It is there.
unsafe fn columns<'a>(
    (place, stride): (Place, usize),
    rows: usize,
    cols: usize,
) -> MatRef<'a, f32> {
    // SAFETY: as the caller says.
    unsafe { MatRef::from_raw_parts(place.0 as *const f32, rows, cols, 1, stride as isize) }
}

/// # Safety
/// As [`columns`], and nobody else uses it.
unsafe fn columns_mut<'a>(
    (place, stride): (Place, usize),
    rows: usize,
    cols: usize,
) -> MatMut<'a, f32> {
    // SAFETY: as the caller says.
    unsafe { MatMut::from_raw_parts_mut(place.0 as *mut f32, rows, cols, 1, stride as isize) }
}

/// The matrix of bf16 numbers in f32.
///
/// # Safety
/// As [`columns`].
unsafe fn halves((place, stride): (Place, usize), rows: usize, cols: usize) -> Mat<f32> {
    let from = place.0 as *const u16;
    Mat::from_fn(rows, cols, |i, j| {
        // SAFETY: as the caller says.
        let bits = unsafe { from.add(j * stride + i).read() };
        half::bf16::from_bits(bits).to_f32()
    })
}

impl Gpu for Emulated {
    fn name(&self) -> &str {
        "emulation"
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    fn allocate(&self, n_bytes: usize) -> Result<Memory> {
        let mut words = vec![0u64; n_bytes.div_ceil(8)];
        Ok(Memory {
            place: Place(words.as_mut_ptr() as u64),
            n_bytes,
            _owner: Box::new(words),
        })
    }

    fn write(&self, to: &Memory, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= to.n_bytes);
        // SAFETY: there is room, as asserted.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.place.0 as *mut u8, bytes.len())
        };
        Ok(())
    }

    fn read(&self, from: &Memory, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.n_bytes);
        let (place, n_bytes) = (from.place.0 as *const u8, bytes.len());
        // SAFETY: as many are there, as asserted.
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), n_bytes) };
        Ok(())
    }

    fn place(&self, tensor: &Tensor) -> Result<Place> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(values)), Some((start, _))) => {
                Ok(Place(values[start..].as_ptr() as u64))
            }
            _ => Err(failed("use a tensor", "not one of contiguous f32")),
        }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        n_blocks: u32,
        n_threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        assert!(NAMES.contains(&kernel));
        let words = arguments.iter().map(|argument| argument.word());
        let mut words: Vec<u64> = words.collect();
        let mut pointers: Vec<*mut c_void> = Vec::new();
        for word in &mut words {
            pointers.push(std::ptr::from_mut(word).cast());
        }
        let name = CString::new(kernel).unwrap();
        // SAFETY: the function has that type; the caller answers for the arguments.
        let code = unsafe {
            let emulate = self.library.get::<Emulate>(b"emulate").unwrap();
            emulate(name.as_ptr(), n_blocks, n_threads, pointers.as_mut_ptr())
        };
        match code {
            0 => Ok(()),
            code => Err(failed(kernel, &format!("code {code}"))),
        }
    }

    unsafe fn gemm(&self, call: Gemm) -> Result<()> {
        let Gemm { m, n, k, beta, .. } = call;
        let shape = |is_transposed: bool, [rows, cols]: [usize; 2]| match is_transposed {
            true => [cols, rows],
            false => [rows, cols],
        };
        let [a_shape, b_shape] = [
            shape(call.is_transposed[0], [m, k]),
            shape(call.is_transposed[1], [k, n]),
        ];
        // SAFETY: the caller says that they are there.
        let (a, b, mut c) = unsafe {
            let of = |place, [rows, cols]: [usize; 2]| match call.is_bf16 {
                true => halves(place, rows, cols),
                false => columns(place, rows, cols).to_owned(),
            };
            (
                of(call.a, a_shape),
                of(call.b, b_shape),
                columns_mut(call.c, m, n),
            )
        };
        let op = |is_transposed: bool, x: &Mat<f32>| match is_transposed {
            true => x.transpose().to_owned(),
            false => x.clone(),
        };
        let (a, b) = (op(call.is_transposed[0], &a), op(call.is_transposed[1], &b));
        let accumulate = match beta {
            0.0 => Accum::Replace,
            1.0 => Accum::Add,
            _ => return Err(failed("gemm", "beta is neither 0 nor 1")),
        };
        matmul(c.as_mut(), accumulate, &a, &b, call.alpha, Par::Seq);
        Ok(())
    }

    unsafe fn syrk_upper(&self, n: usize, k: usize, a: Place, c: Place) -> Result<()> {
        // SAFETY: the caller says that they are there.
        let (a, mut c) = unsafe { (columns((a, n), n, k), columns_mut((c, n), n, n)) };
        let product = a * a.transpose();
        for j in 0..n {
            (0..=j).for_each(|i| c[(i, j)] += product[(i, j)]);
        }
        Ok(())
    }

    unsafe fn symm_upper(&self, n: usize, m: usize, a: Place, b: Place, c: Place) -> Result<()> {
        // SAFETY: the caller says that they are there.
        let (a, b, mut c) = unsafe {
            (
                columns((a, n), n, n),
                columns((b, n), n, m),
                columns_mut((c, n), n, m),
            )
        };
        let full = Mat::from_fn(n, n, |i, j| a[(i.min(j), i.max(j))]);
        matmul(c.as_mut(), Accum::Replace, &full, b, 1.0, Par::Seq);
        Ok(())
    }

    unsafe fn trsm(&self, call: Trsm) -> Result<()> {
        // SAFETY: the caller says that they are there.
        let (a, b) = unsafe {
            (
                columns(call.a, call.m, call.m),
                columns_mut(call.b, call.m, call.n),
            )
        };
        match call.is_transposed {
            false => solve_unit_lower_triangular_in_place(a, b, Par::Seq),
            true => solve_unit_upper_triangular_in_place(a.transpose(), b, Par::Seq),
        }
        Ok(())
    }

    unsafe fn potrf_upper(&self, n: usize, a: Place) -> Result<std::result::Result<(), usize>> {
        // SAFETY: the caller says that it is there.
        let mut u = unsafe { columns_mut((a, n), n, n) };
        for j in 0..n {
            for i in 0..=j {
                let sum: f32 = (0..i).map(|k| u[(k, i)] * u[(k, j)]).sum();
                let left = u[(i, j)] - sum;
                if i < j {
                    u[(i, j)] = left / u[(i, i)];
                } else if left > 0.0 {
                    u[(i, i)] = left.sqrt();
                } else {
                    return Ok(Err(i));
                }
            }
        }
        Ok(Ok(()))
    }
}
