//! Folders of GGUF files: the tensors of the checkpoint that they were made of, under the names that
//! they had there.
//!
//! What each tensor of a file is made of stands in the file ([`Origin`]), so that nothing here knows
//! of families. Floats come back in their types: bit for bit, but for norms whose file has them plus
//! one, which can lose digits below 2⁻²⁴. A quantized linear's blocks are its `weight`, bytes
//! `[rows, bytes of a row]` in the checkpoint's order of rows.

use super::quantization::{Blocks, Gguf};
use super::shard::Shard;
use super::{Checkpoint, DType, Place, Quantization, TensorInfo};
use crate::gguf::{GgufFile, ORIGINS, Origin, Part, Parts, TensorSpec, TensorType, Value, kind_of};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor whose bytes are not in its file as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assembly {
    form: Form,
    parts: Parts,
}

/// What a tensor's elements are here and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    dtype: DType,
    stored: DType,
    /// Whether the file has each value plus one.
    adds_one: bool,
}

impl Form {
    /// Elements that are bytes of blocks.
    const BLOCKS: Self = Self {
        dtype: DType::U8,
        stored: DType::U8,
        adds_one: false,
    };

    fn is_as_stored(self) -> bool {
        self.dtype == self.stored && !self.adds_one
    }

    /// The file's bytes of elements as ours.
    fn restore(self, bytes: Vec<u8>) -> Vec<u8> {
        if self.is_as_stored() {
            return bytes;
        }
        let minus = if self.adds_one { 1.0 } else { 0.0 };
        let values = self.stored.f32_from_bytes(&bytes).unwrap_or_default();
        let values: Vec<f32> = values.iter().map(|value| value - minus).collect();
        self.dtype.bytes_from_f32(&values).unwrap_or_default()
    }
}

impl Assembly {
    /// The tensor's bytes.
    pub(super) fn read(&self, shard: &Shard) -> Result<Vec<u8>> {
        let ranges = self.parts.ranges();
        let parts: Result<Vec<Vec<u8>>> = ranges.map(|range| shard.read(range.clone())).collect();
        let bytes = self.parts.join(&parts?, self.form.stored.n_bytes());
        Ok(self.form.restore(bytes))
    }

    /// The tensor that all parts make up; `None` if they make up none.
    fn into_info(self, shard: usize) -> Option<TensorInfo> {
        let dtype = self.form.dtype;
        let shape = self.parts.shape()?;
        let n_bytes = shape
            .iter()
            .try_fold(dtype.n_bytes(), |n, side| n.checked_mul(*side))?;
        let place = match self.parts.in_one_piece() {
            Some(range) if self.form.is_as_stored() => Place::InFile(range.clone()),
            _ => Place::Assembled(Box::new(self)),
        };
        Some(TensorInfo {
            dtype,
            shape,
            n_bytes,
            shard,
            place,
        })
    }
}

impl Checkpoint {
    /// Takes over the tensors of these files.
    pub(super) fn add_gguf_files(&mut self, paths: &[PathBuf]) -> Result<()> {
        let mut modules = BTreeMap::new();
        for path in paths {
            let (shard, header) = Shard::open_foreign(path)?;
            let contents = Contents::of(path, &GgufFile::of(path, header)?)?;
            for (name, assembly) in contents.tensors {
                let info = assembly.into_info(self.shards.len()).ok_or_else(|| {
                    let why = "the parts that the file has do not make it up";
                    Error::format(path, format!("tensor {name}"), why)
                })?;
                self.add_tensor(path, &name, info)?;
            }
            modules.extend(contents.blocks);
            self.shards.push(shard);
        }
        if !modules.is_empty() {
            self.quantization = Some(Quantization::Gguf(Gguf::new(modules)));
        }
        Ok(())
    }
}

/// What the table of one file comes to.
#[derive(Default)]
struct Contents {
    tensors: BTreeMap<String, Assembly>,
    blocks: BTreeMap<String, Blocks>,
}

impl Contents {
    fn of(path: &Path, file: &GgufFile) -> Result<Self> {
        let Some(Value::Texts(texts)) = file.key(ORIGINS) else {
            let what = format!(
                "{}: a GGUF file without {ORIGINS}, which only those of `vlmq export` have; use \
                 the folder that it was made of",
                path.display()
            );
            return Err(Error::Unsupported { what });
        };
        let places = file.places()?;
        if texts.len() != places.len() {
            let why = format!("expected {} entries, found {}", places.len(), texts.len());
            return Err(Error::format(path, ORIGINS, why));
        }
        let mut contents = Self::default();
        for ((spec, place), text) in places.into_iter().zip(texts) {
            let origin = Origin::from_text(text).ok_or("its origin is not understood");
            let added = origin.and_then(|origin| contents.add(spec, place, origin));
            added.map_err(|why| Error::format(path, format!("tensor {}", spec.name), why))?;
        }
        Ok(contents)
    }

    /// Adds what a tensor of the file is made of; the error says why it cannot be.
    fn add(
        &mut self,
        spec: &TensorSpec,
        place: Range<usize>,
        origin: Origin,
    ) -> std::result::Result<(), &'static str> {
        match origin {
            Origin::Computed { .. } => Ok(()),
            Origin::Packed {
                module,
                rows,
                scheme,
            } => {
                let [n_rows, cols] = spec.shape[..] else {
                    return Err("expected two sides of codes");
                };
                let kind = spec.kind;
                if kind_of(&module, scheme, cols).ok() != Some(kind) {
                    return Err("its type does not hold codes as its origin has them");
                }
                let row_bytes = cols / kind.block_len() * kind.block_bytes();
                let name = format!("{module}.weight");
                self.blocks.insert(module, Blocks { kind, scheme, cols });
                self.add_part(
                    name,
                    Form::BLOCKS,
                    rows.part(),
                    vec![n_rows, row_bytes],
                    place,
                )
            }
            Origin::Stored {
                tensor,
                dtype,
                part,
                adds_one,
            } => {
                let stored = float_type(spec.kind).ok_or("expected floats")?;
                let form = Form {
                    dtype: restored_type(dtype).ok_or("its origin has no floats")?,
                    stored,
                    adds_one,
                };
                self.add_part(tensor, form, part, spec.shape.clone(), place)
            }
        }
    }

    fn add_part(
        &mut self,
        name: String,
        form: Form,
        part: Part,
        shape: Vec<usize>,
        place: Range<usize>,
    ) -> std::result::Result<(), &'static str> {
        let parts = Parts::default();
        let tensor = self.tensors.entry(name);
        let tensor = tensor.or_insert(Assembly { form, parts });
        if tensor.form != form {
            return Err("is of another type than the other parts of its tensor");
        }
        tensor.parts.add(part, shape, place);
        Ok(())
    }
}

fn float_type(kind: TensorType) -> Option<DType> {
    match kind {
        TensorType::F32 => Some(DType::F32),
        TensorType::F16 => Some(DType::F16),
        TensorType::Bf16 => Some(DType::Bf16),
        _ => None,
    }
}

/// The type that elements of `dtype` have here: doubles went into the file as singles.
fn restored_type(dtype: DType) -> Option<DType> {
    match dtype {
        DType::Bf16 | DType::F16 | DType::F32 => Some(dtype),
        DType::F64 => Some(DType::F32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Rows, Writer};
    use crate::plan::{ScaleDtype, Scheme};
    use tempfile::TempDir;

    /// A folder with one file of these tensors, each with what `vlmq.origins` says of it.
    fn folder(tensors: &[(TensorType, &[usize], String, Vec<u8>)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        add_file(&dir, "model.gguf", tensors);
        dir
    }

    fn add_file(dir: &TempDir, file: &str, tensors: &[(TensorType, &[usize], String, Vec<u8>)]) {
        let spec =
            |(index, (kind, shape, ..)): (usize, &(TensorType, &[usize], _, _))| TensorSpec {
                name: format!("t{index}"),
                kind: *kind,
                shape: shape.to_vec(),
            };
        let specs = tensors.iter().enumerate().map(spec).collect();
        let origins = tensors.iter().map(|(_, _, origin, _)| origin.clone());
        let keys = [(ORIGINS.to_owned(), Value::Texts(origins.collect()))];
        let mut writer = Writer::create(&dir.path().join(file), &keys, specs).unwrap();
        for (index, (.., bytes)) in tensors.iter().enumerate() {
            writer.write(&format!("t{index}"), [Ok(bytes)]).unwrap();
        }
        writer.finish().unwrap();
    }

    fn error_of(dir: &TempDir) -> String {
        Checkpoint::open(dir.path()).err().unwrap().to_string()
    }

    fn stored(tensor: &str, dtype: DType, part: Part, adds_one: bool) -> String {
        let tensor = tensor.to_owned();
        let origin = Origin::Stored {
            tensor,
            dtype,
            part,
            adds_one,
        };
        origin.to_text()
    }

    fn packed(bits: u8, group_size: usize, rows: Rows) -> String {
        let scheme = Scheme::new(bits, Some(group_size), true, ScaleDtype::F16).unwrap();
        let module = "m".into();
        let origin = Origin::Packed {
            module,
            rows,
            scheme,
        };
        origin.to_text()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        DType::F32.bytes_from_f32(values).unwrap()
    }

    #[test]
    fn floats_get_their_type_and_norms_their_one_back() {
        let values = [1.5f32, 0.75, 1.0];
        let less: Vec<f32> = values.iter().map(|value| value - 1.0).collect();
        let norm = stored("norm", DType::Bf16, Part::Whole, true);
        let wide = stored("wide", DType::F64, Part::Whole, false);
        let dir = folder(&[
            (TensorType::F32, &[3], norm, floats(&values)),
            (TensorType::F32, &[3], wide, floats(&values)),
            (
                TensorType::F32,
                &[3],
                r#"{"kind":"computed"}"#.into(),
                floats(&values),
            ),
        ]);
        let found = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(found.names().collect::<Vec<_>>(), ["norm", "wide"]);
        let norm = found.info("norm").unwrap();
        assert_eq!((norm.dtype, norm.n_bytes), (DType::Bf16, 6));
        assert_eq!(found.load("norm", &[3]).unwrap(), less);
        assert_eq!(found.load("wide", &[3]).unwrap(), values);
        assert!(found.quantization().is_none());
    }

    /// One block a row: scale 1, codes of rows 0 to 3 all as their number.
    fn four_rows() -> Vec<u8> {
        let row = |code: u8| [&[0, 0x3c][..], &[code * 17; 16]].concat();
        [6, 7, 8, 9].map(row).concat()
    }

    #[test]
    fn blocks_are_read_in_the_order_and_bits_of_the_checkpoint() {
        let heads = Rows::Paired { n_heads: 1 };
        let dir = folder(&[(
            TensorType::Q4_0,
            &[4, 32],
            packed(2, 32, heads),
            four_rows(),
        )]);
        let found = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(found.quantized_modules(), ["m"]);
        assert_eq!(found.linear_info("m").unwrap().1, [4, 32]);
        assert_eq!(found.linear_n_bytes("m"), Some(4 * 18));
        let weight = found.packed_module("m").unwrap();
        assert_eq!(weight.scheme().bits(), 2);
        let first_of_rows: Vec<u8> = weight.codes().iter().copied().step_by(32).collect();
        assert_eq!(first_of_rows, [0, 2, 1, 3]);
        let linear = found.linear_weight("m", 4, 32).unwrap();
        assert_eq!(
            [0, 1, 2, 3].map(|row| linear.row(row)[5]),
            [-2.0, 0.0, -1.0, 1.0]
        );
    }

    #[test]
    fn blocks_that_hold_no_such_codes_are_refused() {
        let read = |blocks: Vec<u8>, bits, group| {
            let origin = packed(bits, group, Rows::Same);
            let dir = folder(&[(TensorType::Q4_0, &[2, 64], origin, blocks)]);
            let found = Checkpoint::open(dir.path()).unwrap();
            found.packed_module("m").map_err(|e| e.to_string())
        };
        assert!(read(four_rows(), 4, 64).is_ok());
        let mut other_scale = four_rows();
        other_scale[18] = 1;
        assert!(read(other_scale.clone(), 4, 32).is_ok());
        assert!(read(other_scale, 4, 64).unwrap_err().contains("Q4_0"));
        let mut wide = four_rows();
        wide[2] = 0x81;
        assert!(read(wide, 2, 32).unwrap_err().contains("2 bits"));
        let mut negative = four_rows();
        negative[1] = 0xbc;
        assert!(read(negative, 4, 32).unwrap_err().contains("m"));
    }

    #[test]
    fn files_that_do_not_fit_their_origins_are_refused() {
        let one = |origin: String| folder(&[(TensorType::F32, &[2], origin, floats(&[1.0, 2.0]))]);
        let bf16 = |part| stored("t", DType::Bf16, part, false);
        for (origin, told) in [
            ("nonsense".into(), "not understood"),
            (stored("t", DType::I32, Part::Whole, false), "no floats"),
            (bf16(Part::Rows(0..3)), "do not make it up"),
            (bf16(Part::Frame(0)), "do not make it up"),
            (packed(4, 32, Rows::Same), "two sides"),
        ] {
            let message = error_of(&one(origin));
            assert!(
                message.contains(told) && message.contains("model.gguf"),
                "{message}"
            );
        }
        let blocks = |kind, origin| folder(&[(kind, &[4, 32], origin, vec![0; 72])]);
        let message = error_of(&blocks(TensorType::Q4_0, packed(8, 32, Rows::Same)));
        assert!(message.contains("does not hold codes"), "{message}");
        let message = error_of(&blocks(TensorType::Q4_0, bf16(Part::Whole)));
        assert!(message.contains("expected floats"), "{message}");
        let other = stored("t", DType::F16, Part::Rows(2..4), false);
        let two =
            [bf16(Part::Rows(0..2)), other].map(|o| (TensorType::F32, &[2][..], o, vec![0; 8]));
        assert!(error_of(&folder(&two)).contains("another type"));
    }

    #[test]
    fn files_of_others_and_tensors_that_come_twice_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let writer = Writer::create(&dir.path().join("model.gguf"), &[], Vec::new()).unwrap();
        writer.finish().unwrap();
        assert!(error_of(&dir).contains("vlmq.origins"));
        let entry = || {
            let origin = stored("t", DType::F32, Part::Whole, false);
            [(TensorType::F32, &[2][..], origin, floats(&[1.0, 2.0]))]
        };
        let dir = folder(&entry());
        add_file(&dir, "other.gguf", &entry());
        assert!(error_of(&dir).contains("already in"));
        std::fs::write(dir.path().join("other.gguf"), "GGU").unwrap();
        assert!(error_of(&dir).contains("other.gguf"));
    }
}
