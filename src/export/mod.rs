//! Output formats: how a quantized weight lies in files that other programs load.
//!
//! | format | bits | groups | grids | file |
//! |---|---|---|---|---|
//! | `compressed-tensors` | 2, 3, 4, 8 | any, or per channel | symmetric, asymmetric | `compressed_tensors` |
//! | `gptq` | 2, 3, 4, 8 | any, or per channel | symmetric (v1), asymmetric (v2) | `gptq` |
//! | `awq` | 4 | any, or per channel | both, as asymmetric | `awq` |
//! | `mlx` | 2, 3, 4, 8 | 32, 64, 128 | both, as asymmetric | `mlx` |
//! | `gguf` | 2, 3, 4, 8 | multiples of 32, super-blocks, or per channel | both | [`gguf`] |
//! | `bf16`, `f16`, `f32` | | | numbers, no codes | `dense` |
//!
//! [`Exporter`] is the way of all of them: it takes quantized modules one by one as they are solved,
//! copies everything else of the source folder unchanged, checks what it wrote by reading it back,
//! and only then lets the output folder appear. What a format is lies in one file each, a `Layout`.

mod awq;
mod compressed_tensors;
mod config;
mod convert;
mod dense;
mod difference;
mod folder;
pub mod gguf;
mod gptq;
mod layout;
mod mlx;
mod names;
mod scales;
mod verify;

pub(crate) use config::without_keys;
pub use convert::{convert, plan_of};
pub(crate) use difference::{differences, shared_differences};
pub use folder::{Exported, Exporter};
pub(crate) use folder::{QUANTIZATION_FILES, copy_side_files};
pub(crate) use names::plain_among_coded;
pub use scales::RoundedScales;
pub(crate) use verify::distance as weight_distance;
pub use verify::{
    Verified, check_config, check_unchanged, verify, verify_against, verify_changed, verify_module,
};

use crate::checkpoint::{Checkpoint, DType};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Result};
use layout::{Layout, Schemes};
use std::str::FromStr;

/// Which module gets which number format.
#[derive(Clone, Debug, PartialEq)]
pub struct ModulePlan {
    /// Checkpoint name of the linear, without `.weight`.
    pub name: String,
    /// Its number format.
    pub scheme: Scheme,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// compressed-tensors `pack-quantized`: vLLM, transformers, SGLang (4 and 8 bits).
    CompressedTensors,
    /// GPTQ: GPTQModel, transformers, vLLM (4 and 8 bits, symmetric), SGLang.
    Gptq,
    /// AWQ, GEMM layout: vLLM, SGLang, transformers.
    Awq,
    /// MLX affine: mlx-vlm.
    Mlx,
    /// GGUF files: llama.cpp. Written from a folder of another format, by [`gguf::export`].
    Gguf,
    /// Plain numbers of one type, for programs that know no quantization.
    Dense(ScaleDtype),
}

impl Format {
    /// Every format, by its name on the command line.
    pub const NAMES: [(&'static str, Self); 8] = [
        ("compressed-tensors", Self::CompressedTensors),
        ("gptq", Self::Gptq),
        ("awq", Self::Awq),
        ("mlx", Self::Mlx),
        ("gguf", Self::Gguf),
        ("bf16", Self::Dense(ScaleDtype::Bf16)),
        ("f16", Self::Dense(ScaleDtype::F16)),
        ("f32", Self::Dense(ScaleDtype::F32)),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        let row = Self::NAMES.iter().find(|(_, format)| *format == self);
        row.map_or("", |(name, _)| name)
    }

    /// The type that scales have in a folder of this format where weights of the model are of
    /// `model_dtype`: what a solver should round them to.
    pub fn scale_dtype(self, model_dtype: ScaleDtype) -> ScaleDtype {
        match self {
            Self::Gptq | Self::Awq | Self::Gguf => ScaleDtype::F16,
            Self::CompressedTensors | Self::Mlx | Self::Dense(_) => model_dtype,
        }
    }

    /// Holds a plan against what the format can hold, without any work.
    ///
    /// # Errors
    /// As [`Exporter::create`] for what is no matter of files.
    pub fn check(self, source: &Checkpoint, plan: &[ModulePlan]) -> Result<()> {
        if self == Self::Gguf {
            gguf::check(source, plan)?;
        }
        folder::check(source, self.folder(), plan)
    }

    /// The format of the folder that is written, or of that which it is made of.
    pub fn folder(self) -> Self {
        match self {
            Self::Gguf => Self::CompressedTensors,
            other => other,
        }
    }

    /// How it, or the folder that it is made of, lays out modules of these formats.
    fn layout(self, schemes: &Schemes) -> &'static dyn Layout {
        match self {
            Self::CompressedTensors | Self::Gguf => &compressed_tensors::CompressedTensors,
            Self::Gptq if schemes.values().all(|scheme| scheme.symmetric()) => &gptq::V1,
            Self::Gptq => &gptq::V2,
            Self::Awq => &awq::Awq,
            Self::Mlx => &mlx::Mlx,
            Self::Dense(ScaleDtype::Bf16) => &dense::BF16,
            Self::Dense(ScaleDtype::F16) => &dense::F16,
            Self::Dense(ScaleDtype::F32 | ScaleDtype::Superblock) => &dense::F32,
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let row = Self::NAMES.iter().find(|(known, _)| *known == name);
        row.map(|(_, format)| *format).ok_or_else(|| {
            let names: Vec<&str> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            Error::Invalid {
                what: format!("--format {name}"),
                why: format!("one of {} expected", names.join(", ")),
            }
        })
    }
}

/// The file type of scales or weights.
fn file_dtype(dtype: ScaleDtype) -> DType {
    match dtype {
        ScaleDtype::Bf16 => DType::Bf16,
        ScaleDtype::F16 => DType::F16,
        ScaleDtype::F32 | ScaleDtype::Superblock => DType::F32,
    }
}

#[cfg(test)]
mod tests;
