//! Which engine loads what, by what command, and how it may be shared out between devices.
//!
//! Sources: vLLM 0.33 (`compressed_tensors_wNa16.py`, `auto_gptq.py`, `auto_awq.py`), SGLang 0.5.23
//! (`layers/quantization`), transformers 5.23 (`quantizers`), optimum 2.3, mlx-vlm 0.7.10,
//! llama.cpp build 11434 (`conversion/base.py`).

use crate::export::gguf::GgufExported;
use crate::export::{Format, ModulePlan};
use crate::model::decoder_config::DecoderConfig;
use crate::plan::Scheme;

/// Devices that people share a model out to.
const DEVICES: [usize; 3] = [2, 4, 8];

/// Codes that a GPTQ reader takes apart at once.
const GPTQ_CODES: usize = 32;

/// Commands for every engine that loads such a folder, and a word on those that do not.
pub(super) fn commands(
    name: &str,
    format: Format,
    plan: &[ModulePlan],
    plain_among_coded: Option<&str>,
) -> String {
    let kinds = Kinds {
        even: plain_among_coded.is_none(),
        ..Kinds::of(plan)
    };
    let mut lines = Vec::new();
    let mut engine = |engine: &str, answer: Answer| match answer {
        Answer::Command(command, note) => {
            lines.push(format!("{engine}{note}\n```\n{command}\n```\n"));
        }
        Answer::No(why) => lines.push(format!("{engine}: no, {why}.\n")),
    };
    engine("vLLM", vllm(name, format, kinds));
    engine("SGLang", sglang(name, format, kinds));
    engine("transformers", transformers(name, format, kinds));
    engine("MLX", mlx(name, format));
    engine("llama.cpp", llama_cpp(format, kinds));
    lines.join("\n")
}

enum Answer {
    /// The command, and what must be known of it.
    Command(String, String),
    No(&'static str),
}

/// What engines distinguish.
#[derive(Clone, Copy)]
struct Kinds {
    /// All of 4 or 8 bits.
    wide: bool,
    symmetric: bool,
    /// None per channel.
    grouped: bool,
    /// One number format for all.
    uniform: bool,
    /// Some are of 3 bits.
    has_three: bool,
    /// What has codes in one layer has them in all.
    even: bool,
}

impl Kinds {
    fn of(plan: &[ModulePlan]) -> Self {
        let all = |f: fn(Scheme) -> bool| plan.iter().all(|module| f(module.scheme));
        Self {
            wide: all(|s| s.bits() == 4 || s.bits() == 8),
            symmetric: all(Scheme::symmetric),
            grouped: all(|s| s.group_size().is_some()),
            has_three: !all(|s| s.bits() != 3),
            even: true,
            uniform: plan.windows(2).all(|pair| pair[0].scheme == pair[1].scheme),
        }
    }
}

fn vllm(name: &str, format: Format, kinds: Kinds) -> Answer {
    let serve = |flags: &str, note: &str| {
        let limit = "--limit-mm-per-prompt '{\"image\": 1}'";
        Answer::Command(format!("vllm serve {name}{flags} {limit}"), note.into())
    };
    let humming = " (0.33 and later; 2 and 3 bits need its Humming kernels, NVIDIA of SM 7.5 and \
                   above):";
    match format {
        Format::CompressedTensors if kinds.wide => serve("", ":"),
        Format::CompressedTensors => serve("", humming),
        Format::Gptq if kinds.wide && kinds.symmetric => serve("", ":"),
        Format::Gptq if kinds.grouped => serve(" --quantization humming", humming),
        Format::Gptq => Answer::No(
            "its Humming kernels take no GPTQ without groups; `vlmq export --format \
             compressed-tensors` makes what it reads",
        ),
        Format::Awq | Format::Dense(_) => serve("", ":"),
        Format::Mlx | Format::Gguf => Answer::No("it does not read such folders"),
    }
}

fn sglang(name: &str, format: Format, kinds: Kinds) -> Answer {
    let serve = |flags: &str, note: &str| {
        let command = format!("python -m sglang.launch_server --model-path {name}{flags}");
        Answer::Command(command, note.into())
    };
    match format {
        Format::CompressedTensors if !kinds.wide => Answer::No(
            "its compressed-tensors knows 4 and 8 bits; `vlmq export --format gptq` makes what its \
             Humming kernels read",
        ),
        Format::Gptq if kinds.wide && kinds.symmetric => serve("", ":"),
        Format::Gptq if kinds.grouped => serve(
            " --quantization humming",
            " (0.5.23; with humming-kernels, NVIDIA of SM 7.5 and above):",
        ),
        Format::Gptq => Answer::No("it has kernels for such codes, but not without groups"),
        Format::Mlx | Format::Gguf => Answer::No("it does not read such folders"),
        _ => serve("", ":"),
    }
}

fn transformers(name: &str, format: Format, kinds: Kinds) -> Answer {
    let needs = match format {
        Format::CompressedTensors if !kinds.symmetric => {
            return Answer::No(
                "compressed-tensors up to 0.20 prepares asymmetric folders with wrong shapes there; \
                 `vlmq export --format gptq` makes what it reads",
            );
        }
        Format::CompressedTensors => " with compressed-tensors 0.18 or later:",
        Format::Gptq if !kinds.uniform => {
            return Answer::No("optimum knows one number format for all modules of a GPTQ folder");
        }
        Format::Gptq if !kinds.even => {
            return Answer::No(
                "optimum puts codes into every layer alike, and here some linears have them in \
                 some layers only; `vlmq export --format compressed-tensors` makes what it reads",
            );
        }
        Format::Gptq => " with optimum and gptqmodel:",
        Format::Awq => " with gptqmodel:",
        Format::Dense(_) => ":",
        Format::Mlx | Format::Gguf => return Answer::No("it does not read such folders"),
    };
    let command = format!(
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\
         model = AutoModelForImageTextToText.from_pretrained(\"{name}\", dtype=\"auto\")\n\
         processor = AutoProcessor.from_pretrained(\"{name}\")"
    );
    Answer::Command(command, needs.into())
}

fn mlx(name: &str, format: Format) -> Answer {
    match format {
        Format::Mlx | Format::Dense(_) => Answer::Command(
            format!("python -m mlx_vlm generate --model {name} --image IMAGE --prompt TEXT"),
            ":".into(),
        ),
        _ => Answer::No("`vlmq export --format mlx` makes what it reads"),
    }
}

/// It reads GGUF files only, for which its converter takes some of our folders.
fn llama_cpp(format: Format, kinds: Kinds) -> Answer {
    let is_read = kinds.uniform && !kinds.has_three;
    Answer::No(match format {
        Format::CompressedTensors if is_read && kinds.grouped => {
            "`vlmq export --format gguf` makes what it reads, with these codes; its own converter \
             takes this folder too and makes plain numbers of it"
        }
        Format::Gptq if is_read => {
            "`vlmq export --format gguf` makes what it reads, with these codes; its own converter \
             takes this folder too and makes plain numbers of it"
        }
        Format::CompressedTensors => {
            "`vlmq export --format gguf` makes what it reads; its own converter takes no 3 bits, \
             nothing per channel and no mixed bits of compressed-tensors"
        }
        Format::Gptq => {
            "`vlmq export --format gguf` makes what it reads; its own converter takes no 3 bits \
             and no mixed bits of GPTQ"
        }
        _ => "`vlmq export --format gguf` makes what it reads",
    })
}

/// What runs GGUF files.
pub(super) fn llama_cpp_commands(name: &str, written: &GgufExported) -> String {
    let model = &written.model.file;
    let command = match &written.mmproj {
        Some(mmproj) => format!(
            "llama-server -m {name}/{model} --mmproj {name}/{0}\n\
             llama-mtmd-cli -m {name}/{model} --mmproj {name}/{0} --image IMAGE -p TEXT",
            mmproj.file
        ),
        None => format!("llama-server -m {name}/{model}"),
    };
    let mut text = format!("llama.cpp:\n```\n{command}\n```\n");
    if let Some(why) = &written.mmproj_absent {
        text += &format!("\nImages need an mmproj file, which is not here: {why}.\n");
    }
    if written.has_imatrix {
        text += "\n`imatrix.gguf` is for `llama-quantize --imatrix`, with the original model's own \
                 F16 or BF16 file.\n";
    }
    text
}

/// What does not divide when the decoder is shared out to several devices.
pub(super) fn tensor_parallel(
    decoder: &DecoderConfig,
    plan: &[ModulePlan],
    format: Format,
) -> String {
    let mut text = String::from("\n## Sharing it out (tensor parallelism)\n");
    for n in DEVICES {
        let problems = problems(decoder, plan, format, n);
        let answer = match problems.is_empty() {
            true => "everything divides".to_owned(),
            false => problems.join("; "),
        };
        text += &format!("- {n} devices: {answer}\n");
    }
    text
}

/// Attention is shared by heads, the MLP by its inner width; groups and words must not be cut.
fn problems(decoder: &DecoderConfig, plan: &[ModulePlan], format: Format, n: usize) -> Vec<String> {
    let groups = plan.iter().filter_map(|module| module.scheme.group_size());
    let group = groups.max().unwrap_or(1);
    let unit = match format {
        Format::Gptq => group.max(GPTQ_CODES),
        Format::Dense(_) => 1,
        _ => group,
    };
    let kv_heads = match n.is_multiple_of(decoder.n_kv_heads) {
        true => None,
        false => indivisible("key-value heads", decoder.n_kv_heads, n, 1),
    };
    let width = decoder.n_heads * decoder.head_dim;
    let of_attention = [
        indivisible("heads", decoder.n_heads, n, 1),
        kv_heads,
        indivisible("attention's width", width, n, unit),
    ];
    let mut problems: Vec<String> = of_attention.into_iter().flatten().collect();
    let width = decoder.intermediate_size;
    if let Some(mut problem) = indivisible("the MLP's width", width, n, unit) {
        if problems.is_empty() && decoder.experts.is_none() {
            let to = width.next_multiple_of(n * unit);
            problem += &format!(
                "; `vlmq pad` with `--for-tp {n} --group-size {unit}` makes it {to}, before quantizing"
            );
        }
        problems.push(problem);
    }
    problems
}

/// That `n` devices cannot have equal parts of `size`, in whole `unit`s.
fn indivisible(what: &str, size: usize, n: usize, unit: usize) -> Option<String> {
    let parts = match unit {
        1 => format!("{n}"),
        _ => format!("{n} parts of whole {unit}s"),
    };
    let divides = size.is_multiple_of(n * unit);
    (!divides).then(|| format!("{what} {size} does not divide into {parts}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::families::open_model;
    use crate::plan::ScaleDtype;
    use candle_core::Device;
    use std::path::Path;

    fn plan(bits: u8, symmetric: bool) -> Vec<ModulePlan> {
        let scheme = Scheme::new(bits, Some(128), symmetric, ScaleDtype::Bf16).unwrap();
        let name = "model.layers.0.mlp.down_proj".into();
        vec![ModulePlan { name, scheme }]
    }

    #[test]
    fn low_bits_get_the_flags_they_need() {
        let text = |format, bits, symmetric| commands("m", format, &plan(bits, symmetric), None);
        assert!(text(Format::Gptq, 3, true).contains("--quantization humming"));
        assert!(text(Format::Gptq, 4, false).contains("--quantization humming"));
        assert!(!text(Format::Gptq, 4, true).contains("humming"));
        let sglang = "sglang.launch_server --model-path m --quantization humming";
        assert!(text(Format::Gptq, 3, true).contains(sglang));
        assert!(text(Format::CompressedTensors, 3, true).contains("Humming"));
        assert!(text(Format::CompressedTensors, 3, true).contains("SGLang: no"));
        assert!(!text(Format::CompressedTensors, 4, true).contains("SGLang: no"));
        assert!(text(Format::Mlx, 4, true).contains("vLLM: no"));
        assert!(text(Format::CompressedTensors, 4, false).contains("transformers: no"));
        assert!(!text(Format::CompressedTensors, 4, true).contains("transformers: no"));
        for format in [Format::CompressedTensors, Format::Gptq] {
            assert!(text(format, 4, true).contains("converter takes this folder too"));
            assert!(text(format, 3, true).contains("converter takes no 3 bits"));
        }
        assert!(!text(Format::Gptq, 4, true).contains("transformers: no"));
        let uneven = commands(
            "m",
            Format::Gptq,
            &plan(4, true),
            Some("m.layers.1.up_proj"),
        );
        assert!(uneven.contains("transformers: no, optimum"), "{uneven}");
    }

    /// The shapes of Qwen2.5-VL-72B, whose MLPs no power of two shares out in groups of 128.
    #[test]
    fn a_width_that_does_not_divide_can_be_padded() {
        let testbed = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testbed/model"));
        let model = open_model(Checkpoint::open(testbed).unwrap(), Device::Cpu).unwrap();
        let mut decoder = model.decoder().clone();
        (decoder.n_heads, decoder.n_kv_heads, decoder.head_dim) = (64, 8, 128);
        decoder.intermediate_size = 29_568;
        let scheme = Scheme::new(4, Some(128), true, ScaleDtype::Bf16).unwrap();
        let name = "m".to_owned();
        let plan = [ModulePlan { name, scheme }];
        let told = tensor_parallel(&decoder, &plan, Format::CompressedTensors);
        assert!(
            told.contains("--for-tp 8 --group-size 128` makes it 29696"),
            "{told}"
        );
        assert!(
            told.contains("--for-tp 2 --group-size 128` makes it 29696"),
            "{told}"
        );
        decoder.intermediate_size = 29_696;
        let told = tensor_parallel(&decoder, &plan, Format::CompressedTensors);
        assert_eq!(told.matches("everything divides").count(), 3, "{told}");
        // Heads cannot be added.
        (decoder.n_heads, decoder.intermediate_size) = (28, 18_944);
        let told = tensor_parallel(&decoder, &plan, Format::CompressedTensors);
        let eight = told.lines().find(|line| line.starts_with("- 8")).unwrap();
        assert!(
            eight.contains("heads 28") && !eight.contains("vlmq pad"),
            "{told}"
        );
    }
}
