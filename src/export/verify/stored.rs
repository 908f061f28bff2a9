//! What the tensors of a quantized module say of its number format, whatever the configuration
//! says, and what the configuration says, as the format's readers understand it.

use crate::checkpoint::{Checkpoint, CompressedTensors, Quantization, name_in_memory};
use crate::export::names::Ignore;
use crate::pack::words_for;
use crate::plan::Scheme;
use serde_json::Value;

/// A number format, as far as tensors tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// Bits per code; absent where nothing fits.
    pub(super) bits: Option<u8>,
    /// Columns.
    pub(super) cols: usize,
    /// Scales of a row.
    pub(super) n_groups: usize,
    pub(super) zeros: Zeros,
}

/// What zero points are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// None are stored.
    Absent,
    /// Stored, and 2^(bits−1) throughout.
    Middle,
    /// Stored, and one less than that throughout.
    BelowMiddle,
    /// Stored, and other ones.
    Other,
}

/// A number format, as far as a configuration tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) bits: Option<u64>,
    /// −1 is the whole row.
    pub(super) group_size: Option<i64>,
    /// Absent where the format does not tell the two apart.
    pub(super) symmetric: Option<bool>,
}

impl Stored {
    /// Of one module of a folder; `None` if its tensors cannot be read, which is told elsewhere.
    pub(super) fn of(written: &Checkpoint, module: &str) -> Option<Self> {
        let (_, shape) = written.linear_info(module)?;
        let [_, cols] = shape[..] else { return None };
        let side = |part: &str, at: usize| {
            let info = written.info(&format!("{module}.{part}"))?;
            info.shape.get(at).copied()
        };
        let bits_of = |n_words: usize| {
            let mut known = Scheme::BITS.into_iter();
            known.find(|bits| words_for(cols, *bits) == Some(n_words))
        };
        let (bits, n_groups, zeros) = match written.quantization()? {
            Quantization::CompressedTensors(_) => {
                let zeros = written.contains(&format!("{module}.weight_zero_point"));
                let zeros = if zeros { Zeros::Other } else { Zeros::Absent };
                let bits = bits_of(side("weight_packed", 1)?);
                (bits, side("weight_scale", 1)?, zeros)
            }
            Quantization::Gptq(_) => {
                let bits = bits_of(side("qweight", 0)?)?;
                let zeros = zeros_of(&written.stored_zero_points(module, bits).ok()?, bits);
                (Some(bits), side("scales", 0)?, zeros)
            }
            Quantization::Awq(_) => (Some(4), side("scales", 0)?, Zeros::Other),
            Quantization::Mlx(_) => {
                let bits = bits_of(side("weight", 1)?);
                (bits, side("scales", 1)?, Zeros::Other)
            }
            Quantization::Gguf(_) => return None,
        };
        (n_groups > 0 && cols > 0).then_some(Self {
            bits,
            cols,
            n_groups,
            zeros,
        })
    }

    /// Whether groups of this size, or whole rows for −1, are what is stored.
    pub(super) fn has_groups(self, group_size: i64) -> bool {
        match group_size {
            -1 => self.n_groups == 1,
            size => usize::try_from(size).is_ok_and(|size| size * self.n_groups == self.cols),
        }
    }

    /// The size of its groups as a configuration has it; whole rows are −1.
    pub(super) fn group_size(self) -> i64 {
        match self.n_groups {
            1 => -1,
            n => (self.cols / n) as i64,
        }
    }
}

fn zeros_of(stored: &[u8], bits: u8) -> Zeros {
    let middle = 1 << (bits - 1);
    let are_all = |value: u8| stored.iter().all(|zero| *zero == value);
    match (are_all(middle), are_all(middle - 1)) {
        (true, _) => Zeros::Middle,
        (_, true) => Zeros::BelowMiddle,
        _ => Zeros::Other,
    }
}

impl Said {
    /// Of one module by its name in the file; `None` if the configuration gives it no format.
    pub(super) fn of(quantization: &Quantization, config: &Value, module: &str) -> Option<Self> {
        match quantization {
            Quantization::CompressedTensors(q) => Self::of_compressed_tensors(q, module),
            Quantization::Gptq(_) => Self::of_gptq(&config["quantization_config"], module),
            Quantization::Awq(_) => Some(Self {
                symmetric: None,
                ..Self::flat(&config["quantization_config"])
            }),
            Quantization::Mlx(_) => {
                let common = &config["quantization"];
                let own = common.get(module).filter(|own| own.is_object());
                Some(Self {
                    symmetric: None,
                    ..Self::flat(own.unwrap_or(common))
                })
            }
            Quantization::Gguf(_) => None,
        }
    }

    fn flat(config: &Value) -> Self {
        Self {
            bits: config["bits"].as_u64(),
            group_size: config["group_size"].as_i64(),
            symmetric: config["sym"].as_bool(),
        }
    }

    fn of_compressed_tensors(config: &CompressedTensors, module: &str) -> Option<Self> {
        let group = config.targeted(module)?;
        Some(Self {
            bits: Some(group.bits.into()),
            group_size: Some(group.group_size.map_or(-1, |size| size as i64)),
            symmetric: Some(group.symmetric),
        })
    }

    /// The first rule of `dynamic` that matches counts; what it does not say is as for all.
    fn of_gptq(config: &Value, module: &str) -> Option<Self> {
        let common = Self::flat(config);
        let in_memory = name_in_memory(module);
        let rules = config["dynamic"].as_object().into_iter().flatten();
        let mut matching = rules.filter(|(rule, _)| {
            let pattern = rule.strip_prefix("+:").or(rule.strip_prefix("-:"));
            let pattern = Ignore::pattern(pattern.unwrap_or(rule));
            let in_memory = in_memory.as_deref();
            pattern.matches(module) || in_memory.is_some_and(|name| pattern.matches(name))
        });
        match matching.next() {
            None => Some(common),
            Some((rule, _)) if rule.starts_with("-:") => None,
            Some((_, own)) => {
                let own = Self::flat(own);
                Some(Self {
                    bits: own.bits.or(common.bits),
                    group_size: own.group_size.or(common.group_size),
                    symmetric: own.symmetric.or(common.symmetric),
                })
            }
        }
    }
}
