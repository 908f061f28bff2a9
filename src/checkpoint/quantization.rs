//! Reading of compressed-tensors `pack-quantized` weights.
//!
//! A quantized linear `m` of `[rows, cols]` has
//! - `m.weight_packed` int32 `[rows, ceil(cols·bits/32)]`, each row a bitstream of unsigned codes;
//! - `m.weight_scale` `[rows, n_groups]`;
//! - `m.weight_zero_point` int32 `[ceil(rows·bits/32), n_groups]` if the scheme is asymmetric, each
//!   column a bitstream;
//! - `m.weight_shape` `[2]` = (rows, cols).
//!
//! A weight is (code − zero point) · scale. Dense 3-bit words are what compressed-tensors 0.18 and
//! later write; older files pad them and are refused by their shape.

use super::{Checkpoint, DType};
use crate::pack::{unpack, words_for};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Matrix, QuantizedWeight, Result};
use regex::Regex;
use serde_json::Value;
use std::path::Path;

/// What a folder's `quantization_config` says about its weights.
#[derive(Clone, Debug)]
pub struct QuantizationConfig {
    groups: Vec<QuantizationGroup>,
    ignore: Vec<String>,
}

/// One number format and the modules that have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationGroup {
    /// Module names, `re:` patterns, or class names such as `Linear`.
    pub targets: Vec<String>,
    /// Bits per code.
    pub bits: u8,
    /// Columns that share a scale; `None` is the whole row.
    pub group_size: Option<usize>,
    /// Whether the zero point is fixed at 2^(bits−1) and not stored.
    pub symmetric: bool,
}

impl QuantizationConfig {
    /// The formats, in file order.
    pub fn groups(&self) -> &[QuantizationGroup] {
        &self.groups
    }

    /// Names and `re:` patterns of modules that were left alone.
    pub fn ignore(&self) -> &[String] {
        &self.ignore
    }

    /// Reads `quantization_config` of a model configuration; `None` if there is none.
    pub(super) fn from_config(path: &Path, config: &Value) -> Result<Option<Self>> {
        let Some(found) = config.get("quantization_config").filter(|v| !v.is_null()) else {
            return Ok(None);
        };
        for (key, expected) in [
            ("quant_method", "compressed-tensors"),
            ("format", "pack-quantized"),
            ("quantization_status", "compressed"),
        ] {
            let value = found.get(key).unwrap_or(&Value::Null);
            if value.as_str() != Some(expected) {
                let what = format!(
                    "{}: quantization_config.{key} is {value}, only \"{expected}\" is read",
                    path.display()
                );
                return Err(Error::Unsupported { what });
            }
        }
        let groups = found.get("config_groups").and_then(Value::as_object);
        let groups = groups.filter(|g| !g.is_empty()).ok_or_else(|| {
            let at = "quantization_config.config_groups";
            Error::format(path, at, "expected an object with at least one group")
        })?;
        Ok(Some(Self {
            groups: groups
                .iter()
                .map(|(name, group)| QuantizationGroup::from_json(path, name, group))
                .collect::<Result<_>>()?,
            ignore: strings(found.get("ignore")).unwrap_or_default(),
        }))
    }

    /// The format of `module`: the group that names it, else one whose pattern matches, else the
    /// one for its class. A folder with one group has no choice to make.
    fn group_of(&self, module: &str) -> Option<&QuantizationGroup> {
        if let [only] = self.groups.as_slice() {
            return Some(only);
        }
        let find = |f: &dyn Fn(&str) -> bool| {
            let mut groups = self.groups.iter();
            groups.find(|g| g.targets.iter().any(|target| f(target)))
        };
        find(&|target| target == module)
            .or_else(|| find(&|target| pattern_matches(target, module)))
            .or_else(|| find(&|target| target == "Linear"))
    }
}

/// Whether a `re:` target matches from the start of the name, as Python's `re.match` does.
fn pattern_matches(target: &str, module: &str) -> bool {
    let pattern = target.strip_prefix("re:");
    pattern
        .and_then(|p| Regex::new(&format!("^(?:{p})")).ok())
        .is_some_and(|regex| regex.is_match(module))
}

fn strings(value: Option<&Value>) -> Option<Vec<String>> {
    let items = value?.as_array()?.iter();
    items.map(|v| v.as_str().map(str::to_owned)).collect()
}

impl QuantizationGroup {
    fn from_json(path: &Path, name: &str, group: &Value) -> Result<Self> {
        let fail = |key: &str, expected: &str| {
            let at = format!("quantization_config.config_groups.{name}.{key}");
            Error::format(path, at, format!("expected {expected}"))
        };
        let targets = strings(group.get("targets"));
        let weights = group.get("weights").unwrap_or(&Value::Null);
        if weights.get("type").and_then(Value::as_str) != Some("int") {
            return Err(fail("weights.type", "\"int\""));
        }
        if !group
            .get("input_activations")
            .unwrap_or(&Value::Null)
            .is_null()
        {
            return Err(fail(
                "input_activations",
                "null: only weights may be quantized",
            ));
        }
        let bits = weights.get("num_bits").and_then(Value::as_u64);
        let bits = bits.and_then(|b| u8::try_from(b).ok());
        let group_size = weights.get("group_size").and_then(Value::as_u64);
        let group_size = match weights.get("strategy").and_then(Value::as_str) {
            Some("channel") => None,
            Some("group") => {
                let size = group_size.and_then(|g| usize::try_from(g).ok());
                Some(size.ok_or_else(|| fail("weights.group_size", "a positive integer"))?)
            }
            _ => return Err(fail("weights.strategy", "\"group\" or \"channel\"")),
        };
        Ok(Self {
            targets: targets.ok_or_else(|| fail("targets", "a list of strings"))?,
            bits: bits.ok_or_else(|| fail("weights.num_bits", "an integer"))?,
            group_size,
            symmetric: weights
                .get("symmetric")
                .and_then(Value::as_bool)
                .unwrap_or(true),
        })
    }
}

impl Checkpoint {
    /// The codes, scales and zero points of a quantized linear, by checkpoint name.
    ///
    /// # Errors
    /// [`Error::Missing`] if a tensor or its format is absent; [`Error::Shape`] if a tensor's shape
    /// disagrees with `weight_shape` and the format; [`Error::Format`] for a wrong element type or
    /// a spare bit that is not zero; [`Error::NotFinite`] for scales, and [`Error::Invalid`] if one
    /// is not positive.
    pub fn packed_module(&self, module: &str) -> Result<QuantizedWeight> {
        let group = self.quantization().and_then(|q| q.group_of(module));
        let group = group.ok_or_else(|| Error::Missing {
            what: format!("a quantization group for {module}"),
            place: self.dir().join(super::CONFIG_FILE).display().to_string(),
        })?;
        let scheme = self.packed_scheme(module, group)?;
        let (rows, cols) = self.packed_shape(module)?;
        let n_groups = cols / scheme.group_len(module, cols)?;
        let codes = self.packed_codes(&format!("{module}.weight_packed"), rows, cols, scheme)?;
        let scale_name = format!("{module}.weight_scale");
        let scales = self.load(&scale_name, &[rows, n_groups])?;
        let zero_points = if scheme.symmetric() {
            vec![1 << (scheme.bits() - 1); scales.len()]
        } else {
            self.packed_zero_points(module, rows, n_groups, scheme)?
        };
        let scales = Matrix::from_vec(&scale_name, rows, n_groups, scales)?;
        QuantizedWeight::new(module, scheme, [rows, cols], codes, scales, zero_points)
    }

    fn packed_scheme(&self, module: &str, group: &QuantizationGroup) -> Result<Scheme> {
        let name = format!("{module}.weight_scale");
        let scale_dtype = match self.require_info(&name)?.dtype {
            DType::Bf16 => ScaleDtype::Bf16,
            DType::F16 => ScaleDtype::F16,
            DType::F32 => ScaleDtype::F32,
            other => {
                let why = format!("expected BF16, F16 or F32, found {}", other.name());
                return Err(self.tensor_error(&name, why));
            }
        };
        Scheme::new(group.bits, group.group_size, group.symmetric, scale_dtype)
    }

    /// (rows, cols) as `weight_shape` has them. The caller compares them with the other tensors'
    /// real shapes before anything is allocated by them.
    fn packed_shape(&self, module: &str) -> Result<(usize, usize)> {
        let name = format!("{module}.weight_shape");
        let info = self.require_info(&name)?;
        let bytes = self.bytes(&name)?;
        let sides: Option<Vec<usize>> = match info.dtype {
            DType::I64 => sides(&bytes, i64::from_le_bytes),
            DType::I32 => sides(&bytes, |b| i64::from(i32::from_le_bytes(b))),
            _ => None,
        };
        match sides.as_deref() {
            Some([rows, cols]) if *rows > 0 && *cols > 0 => Ok((*rows, *cols)),
            _ => {
                let found = format!("{} {:?}: {sides:?}", info.dtype.name(), info.shape);
                let why = format!("expected two positive I64 or I32 values, found {found}");
                Err(self.tensor_error(&name, why))
            }
        }
    }

    /// Codes `[n_streams, n]` of an int32 tensor whose rows are bitstreams.
    fn packed_codes(
        &self,
        name: &str,
        n_streams: usize,
        n: usize,
        scheme: Scheme,
    ) -> Result<Vec<u8>> {
        let n_words = words_for(n, scheme.bits()).unwrap_or(usize::MAX);
        let words = self.packed_words(name, [n_streams, n_words])?;
        let streams = words.chunks_exact(n_words);
        let mut codes = Vec::with_capacity(words.len() * 32 / usize::from(scheme.bits()));
        for stream in streams {
            codes.extend(self.checked_unpack(name, stream, n, scheme)?);
        }
        Ok(codes)
    }

    /// Zero points `[rows, n_groups]` of a tensor whose columns are bitstreams.
    fn packed_zero_points(
        &self,
        module: &str,
        rows: usize,
        n_groups: usize,
        scheme: Scheme,
    ) -> Result<Vec<u8>> {
        let name = format!("{module}.weight_zero_point");
        let n_words = words_for(rows, scheme.bits()).unwrap_or(usize::MAX);
        let words = self.packed_words(&name, [n_words, n_groups])?;
        let mut zero_points = vec![0; rows * n_groups];
        for group in 0..n_groups {
            let stream: Vec<u32> = words
                .iter()
                .skip(group)
                .step_by(n_groups)
                .copied()
                .collect();
            let column = self.checked_unpack(&name, &stream, rows, scheme)?;
            for (row, zero) in column.into_iter().enumerate() {
                zero_points[row * n_groups + group] = zero;
            }
        }
        Ok(zero_points)
    }

    fn packed_words(&self, name: &str, shape: [usize; 2]) -> Result<Vec<u32>> {
        let info = self.require_info(name)?;
        if info.dtype != DType::I32 {
            let why = format!("expected I32, found {}", info.dtype.name());
            return Err(self.tensor_error(name, why));
        }
        if info.shape != shape {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        let bytes = self.bytes(name)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    fn checked_unpack(
        &self,
        name: &str,
        stream: &[u32],
        n: usize,
        scheme: Scheme,
    ) -> Result<Vec<u8>> {
        let unpacked = unpack(stream, scheme.bits(), n);
        if !unpacked.padding_is_zero {
            return Err(self.tensor_error(name, "the spare bits after the last code are not zero"));
        }
        Ok(unpacked.codes)
    }
}

fn sides<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> i64) -> Option<Vec<usize>> {
    let (values, _) = bytes.as_chunks::<N>();
    if values.len() != 2 {
        return None;
    }
    values.iter().map(|b| usize::try_from(f(*b)).ok()).collect()
}
