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

use super::Packed;
use super::columns::Columns;
use super::words::turned;
use crate::checkpoint::{CONFIG_FILE, Checkpoint, DType};
use crate::plan::Scheme;
use crate::{Error, Matrix, QuantizedWeight, Result};
use regex::Regex;
use serde_json::Value;
use std::path::Path;

/// Tensors of a quantized module.
pub(super) const SUFFIXES: [&str; 4] = [
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
];

/// What a `quantization_config` of `quant_method: compressed-tensors` says about the weights.
#[derive(Clone, Debug)]
pub struct CompressedTensors {
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

impl CompressedTensors {
    /// The formats, in file order.
    pub fn groups(&self) -> &[QuantizationGroup] {
        &self.groups
    }

    /// Names and `re:` patterns of modules that were left alone.
    pub fn ignore(&self) -> &[String] {
        &self.ignore
    }

    pub(super) fn from_config(path: &Path, found: &Value) -> Result<Self> {
        for (key, expected) in [
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
        Ok(Self {
            groups: groups
                .iter()
                .map(|(name, group)| QuantizationGroup::from_json(path, name, group))
                .collect::<Result<_>>()?,
            ignore: strings(found.get("ignore")).unwrap_or_default(),
        })
    }

    /// The format of `module`: the group that names it, else one whose pattern matches, else the
    /// one for its class. A folder with one group has no choice to make.
    fn group_of(&self, module: &str) -> Option<&QuantizationGroup> {
        match self.groups.as_slice() {
            [only] => Some(only),
            _ => self.targeted(module),
        }
    }

    /// The group with a target that means `module`, as loaders look for it.
    pub(crate) fn targeted(&self, module: &str) -> Option<&QuantizationGroup> {
        let in_memory = name_in_memory(module);
        self.group_named(module)
            .or_else(|| self.group_named(in_memory.as_deref()?))
            .or_else(|| {
                let mut groups = self.groups.iter();
                groups.find(|g| g.targets.iter().any(|target| target == "Linear"))
            })
    }

    fn group_named(&self, module: &str) -> Option<&QuantizationGroup> {
        let find = |f: &dyn Fn(&str) -> bool| {
            let mut groups = self.groups.iter();
            groups.find(|g| g.targets.iter().any(|target| f(target)))
        };
        find(&|target| target == module).or_else(|| find(&|target| pattern_matches(target, module)))
    }
}

/// What transformers 5 calls a linear of the decoder in memory, where its name in the file is another:
/// other tools write their targets by that name.
pub(crate) fn name_in_memory(module: &str) -> Option<String> {
    const IN_MEMORY: &str = "model.language_model.layers.";
    let rest = |prefix| module.strip_prefix(prefix);
    let rest = rest("model.layers.").or_else(|| rest("language_model.model.layers."))?;
    Some(format!("{IN_MEMORY}{rest}"))
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

impl CompressedTensors {
    pub(super) fn read(&self, checkpoint: &Checkpoint, module: &str) -> Result<Packed> {
        let group = self.group_of(module).ok_or_else(|| Error::Missing {
            what: format!("a quantization group for {module}"),
            place: checkpoint.dir().join(CONFIG_FILE).display().to_string(),
        })?;
        let name = |suffix: &str| format!("{module}.{suffix}");
        if checkpoint.contains(&name("weight_g_idx")) {
            // Read in order its weights would be others, and nothing would tell.
            let what = format!("{module}: columns in groups of their own order (weight_g_idx)");
            return Err(Error::Unsupported { what });
        }
        let scale_dtype = checkpoint.scale_dtype(&name("weight_scale"))?;
        let scheme = Scheme::new(group.bits, group.group_size, group.symmetric, scale_dtype)?;
        let bits = scheme.bits();
        let [rows, cols] = packed_shape(checkpoint, module)?;
        let n_groups = cols / scheme.group_len(module, cols)?;
        let codes = checkpoint.codes_along_rows(&name("weight_packed"), [rows, cols], bits)?;
        let scales = checkpoint.load(&name("weight_scale"), &[rows, n_groups])?;
        let zero_points = if scheme.symmetric() {
            vec![1 << (bits - 1); scales.len()]
        } else {
            let name = name("weight_zero_point");
            let columns = checkpoint.codes_down_columns(&name, [rows, n_groups], bits)?;
            turned(&columns, rows)
        };
        let scales = Matrix::from_vec(&name("weight_scale"), rows, n_groups, scales)?;
        let weight =
            QuantizedWeight::new(module, scheme, [rows, cols], codes, scales, zero_points)?;
        Ok(Packed {
            weight,
            columns: Columns::InOrder,
        })
    }
}

/// (rows, cols) as `weight_shape` has them. The caller compares them with the other tensors' real
/// shapes before anything is allocated by them.
pub(super) fn packed_shape(checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
    let name = format!("{module}.weight_shape");
    let info = checkpoint.require_info(&name)?;
    let bytes = checkpoint.bytes(&name)?;
    let sides: Option<Vec<usize>> = match info.dtype {
        DType::I64 => sides(&bytes, i64::from_le_bytes),
        DType::I32 => sides(&bytes, |b| i64::from(i32::from_le_bytes(b))),
        _ => None,
    };
    match sides.as_deref() {
        Some([rows, cols]) if *rows > 0 && *cols > 0 => Ok([*rows, *cols]),
        _ => {
            let found = format!("{} {:?}: {sides:?}", info.dtype.name(), info.shape);
            let why = format!("expected two positive I64 or I32 values, found {found}");
            Err(checkpoint.tensor_error(&name, why))
        }
    }
}

fn sides<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> i64) -> Option<Vec<usize>> {
    let (values, _) = bytes.as_chunks::<N>();
    if values.len() != 2 {
        return None;
    }
    values.iter().map(|b| usize::try_from(f(*b)).ok()).collect()
}
