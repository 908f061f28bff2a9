//! Whatever is wrong with the input: one clear error, a hint, exit code 2, and nothing written.

use super::{model_copy, quantize, repository, text, vlmq};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::process::Output;

/// The run failed as it should: the error names `expected`, and `folder` holds only `kept` entries
/// and, if it says so, the layers that were finished before.
pub fn assert_clear_failure(run: &Output, expected: &[&str], folder: &Path, kept: usize) {
    let stderr = text(&run.stderr);
    assert_eq!(run.status.code(), Some(2), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{part:?} expected in: {stderr}");
    }
    assert!(
        stderr
            .trim_end()
            .lines()
            .last()
            .unwrap()
            .starts_with("hint: "),
        "{stderr}"
    );
    let entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    let n_progress = entries
        .iter()
        .filter(|e| e.to_string_lossy().ends_with(".progress"))
        .count();
    let says_so = stderr.contains("finished layers are kept in");
    assert_eq!(n_progress, usize::from(says_so), "{stderr}");
    assert_eq!(entries.len(), kept + n_progress, "left behind: {entries:?}");
}

/// Damages a copy of the model, quantizes it, and expects a clear failure.
fn with_damaged_model(damage: impl Fn(&Path), expected: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let model = model_copy(home.path());
    damage(&model);
    let run = quantize(&model, &home.path().join("out"), &["--bits", "3"]);
    assert_clear_failure(&run, expected, home.path(), 1);
}

fn edit(path: &Path, change: impl Fn(Vec<u8>) -> Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, change(bytes)).unwrap();
}

/// Sets the first value of a bf16 tensor.
pub fn poke(model: &Path, tensor: &str, bits: u16) {
    edit(&model.join("model.safetensors"), |mut bytes| {
        let place = {
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let data = tensors.tensor(tensor).unwrap().data();
            data.as_ptr() as usize - bytes.as_ptr() as usize
        };
        bytes[place..place + 2].copy_from_slice(&bits.to_le_bytes());
        bytes
    });
}

const WEIGHT: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn truncated_weights() {
    let cut = |model: &Path| {
        edit(&model.join("model.safetensors"), |bytes| {
            bytes[..bytes.len() / 2].to_vec()
        });
    };
    with_damaged_model(cut, &["model.safetensors"]);
    let empty = |model: &Path| edit(&model.join("model.safetensors"), |_| vec![1, 2, 3]);
    with_damaged_model(empty, &["model.safetensors"]);
}

#[test]
fn a_header_length_that_lies() {
    for length in [0u64, 1 << 20, 1 << 40, u64::MAX] {
        let lie = |model: &Path| {
            edit(&model.join("model.safetensors"), |mut bytes| {
                bytes[..8].copy_from_slice(&length.to_le_bytes());
                bytes
            });
        };
        with_damaged_model(lie, &["model.safetensors"]);
    }
}

#[test]
fn a_missing_shard() {
    let shard = |model: &Path| {
        std::fs::rename(
            model.join("model.safetensors"),
            model.join("model-00001-of-00002.safetensors"),
        )
        .unwrap();
        let index =
            format!("{{\"weight_map\": {{\"{WEIGHT}\": \"model-00002-of-00002.safetensors\"}}}}");
        std::fs::write(model.join("model.safetensors.index.json"), index).unwrap();
    };
    with_damaged_model(shard, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn weights_that_are_not_numbers() {
    for bits in [0x7fc0, 0x7f80] {
        with_damaged_model(
            |model| poke(model, WEIGHT, bits),
            &[WEIGHT, "NaN or infinite"],
        );
    }
}

#[test]
fn a_wrong_shape() {
    let widen = |model: &Path| {
        edit(&model.join("config.json"), |bytes| {
            text(&bytes)
                .replace("\"intermediate_size\": 768", "\"intermediate_size\": 640")
                .into_bytes()
        });
    };
    with_damaged_model(widen, &["mlp.gate_proj", "expected shape", "640", "768"]);
}

#[test]
fn an_unknown_architecture() {
    let rename = |model: &Path| {
        edit(&model.join("config.json"), |bytes| {
            text(&bytes)
                .replace(
                    "\"model_type\": \"qwen2_vl\"",
                    "\"model_type\": \"novel_vl\"",
                )
                .into_bytes()
        });
    };
    with_damaged_model(rename, &["config.json", "novel_vl", "qwen2_vl"]);
    with_damaged_model(
        |m| std::fs::write(m.join("config.json"), "{").unwrap(),
        &["config.json"],
    );
    with_damaged_model(
        |m| std::fs::remove_file(m.join("tokenizer.json")).unwrap(),
        &["tokenizer.json"],
    );
}

/// Quantizes the sound model with these flags and expects a clear failure.
fn with_flags(flags: &[&str], expected: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let run = quantize(
        &repository("testbed/model"),
        &home.path().join("out"),
        flags,
    );
    assert_clear_failure(&run, expected, home.path(), 0);
}

#[test]
fn flags_that_cannot_be() {
    with_flags(
        &["--group-size", "96"],
        &["group-size 96", "q_proj", "does not divide"],
    );
    with_flags(&["--group-size", "7"], &["--group-size", "multiple of 8"]);
    for bits in ["5", "1.5", "9", "NaN", "-1", "4.5", ""] {
        with_flags(&["--bits", bits], &["--bits", bits, "2.5"]);
    }
    with_flags(&["--bits", "2,5"], &["--bits 2,5", "comma"]);
    with_flags(
        &["--bits", "2.5", "--method", "rtn"],
        &["--bits 2.5", "rtn", "samples"],
    );
    with_flags(
        &["--set", "allocation_by=size"],
        &["allocation_by", "answer"],
    );
    with_flags(&["--device", "gpu:0"], &["--device", "cuda:0"]);
    with_flags(&["--device", "cuda:97"], &["cuda:97"]);
    with_flags(&["--products", "bf16"], &["--products", "--device cuda:N"]);
    with_flags(&["--products", "fp8"], &["--products", "bf16"]);
    with_flags(&["--method", "magic"], &["magic", "vlmq-v1"]);
    with_flags(&["--set", "percdamp=0.1"], &["percdamp", "dampening_frac"]);
    with_flags(&["--samples", "100000"], &["--samples 100000"]);
    with_flags(&["--samples", "0"], &["--samples 0"]);
    with_flags(&["--calibration", "nowhere.jsonl"], &["nowhere.jsonl"]);
}

/// Calibrates on `lines` with `files` beside them and expects a clear failure.
fn with_samples(lines: &str, files: &[(&str, &[u8])], expected: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("samples.jsonl"), lines).unwrap();
    for (name, bytes) in files {
        std::fs::write(data.join(name), bytes).unwrap();
    }
    let flags = ["--calibration", data.to_str().unwrap(), "--samples", "1"];
    let run = quantize(
        &repository("testbed/model"),
        &home.path().join("out"),
        &flags,
    );
    assert_clear_failure(&run, expected, home.path(), 1);
}

const TURNS: &str = r#""conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]"#;

#[test]
fn samples_that_are_none() {
    let named = |image: &str| format!("{{\"id\": \"a\", \"image\": \"{image}\", {TURNS}}}\n");
    with_samples("", &[], &["the set is empty", "data"]);
    with_samples("{\"id\": \n", &[], &["samples.jsonl", "1"]);
    with_samples(&named("gone.png"), &[], &["gone.png"]);
    with_samples(&named("../out.png"), &[], &["../out.png"]);
    with_samples(
        &named("text.png"),
        &[("text.png", b"no picture at all")],
        &["text.png"],
    );
    with_samples(
        &format!("{{\"id\": \"a\", {TURNS}}}\n"),
        &[],
        &["samples.jsonl"],
    );
}

#[test]
fn outputs_that_cannot_be() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let there = home.path().join("there");
    std::fs::create_dir(&there).unwrap();
    std::fs::write(there.join("precious"), "keep").unwrap();
    let run = quantize(&model, &there, &[]);
    assert_clear_failure(&run, &["there", "exists already"], home.path(), 1);
    assert_eq!(
        std::fs::read_to_string(there.join("precious")).unwrap(),
        "keep"
    );
    // Below a plain file nothing can be made, whoever asks.
    let below = there.join("precious").join("out");
    assert_clear_failure(
        &quantize(&model, &below, &[]),
        &["precious"],
        home.path(),
        1,
    );
    // Folders on the way are made.
    let deep = home.path().join("no/such/place");
    let run = quantize(&model, &deep, &["--method", "rtn"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(deep.join("model.safetensors").is_file());
}

#[test]
fn a_quantized_model_is_not_quantized_again() {
    let home = tempfile::tempdir().unwrap();
    let first = home.path().join("first");
    assert!(
        quantize(&repository("testbed/model"), &first, &["--method", "rtn"])
            .status
            .success()
    );
    let again = quantize(&first, &home.path().join("second"), &["--method", "rtn"]);
    assert_clear_failure(&again, &["first", "quantized"], home.path(), 1);
}

#[test]
fn unknown_commands_are_told() {
    let run = vlmq().arg("quantise").output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    assert!(text(&run.stderr).contains("quantize"));
}
