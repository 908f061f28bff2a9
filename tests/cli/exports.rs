//! From one format to another, and looking at what was written, with the real program.

use super::{eval_counting, json, quantize, repository, text, vlmq};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use tempfile::TempDir;

/// A home with the bundled model rounded to a grid.
fn home(more: &[&str]) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("quantized");
    let arguments = [&["--method", "rtn"], more].concat();
    let made = quantize(&repository("testbed/model"), &output, &arguments);
    assert!(made.status.success(), "{}", text(&made.stderr));
    (home, output)
}

fn export(from: &Path, format: &str, to: &Path, more: &[&str]) -> Output {
    let mut command = vlmq();
    command.arg("export").arg(from).args(["--format", format]);
    command.arg("--output").arg(to).args(more).output().unwrap()
}

fn verify(folder: &Path, expected: i32) -> Value {
    let mut command = vlmq();
    command.arg("verify").arg(folder).arg("--against");
    command.arg(repository("testbed/model")).arg("--json");
    let done = command.output().unwrap();
    assert_eq!(done.status.code(), Some(expected), "{}", text(&done.stderr));
    json(&done.stdout)["verification"].take()
}

/// The answers do not depend on the format that holds the weights.
#[test]
fn every_format_is_the_same_model() {
    let (home, first) = home(&["--bits", "4"]);
    let original = repository("testbed/model");
    let expected = eval_counting(&first, &original);
    let distances = verify(&first, 0)["modules"].take();
    assert!(distances[0]["relative_error"].as_f64().unwrap() > 0.01);
    for format in ["gptq", "awq", "mlx", "f32", "bf16"] {
        let output = home.path().join(format);
        let done = export(&first, format, &output, &["--json"]);
        assert!(done.status.success(), "{format}: {}", text(&done.stderr));
        assert_eq!(json(&done.stdout)["rounded_scales"]["n_rounded"], 0);
        let found = verify(&output, 0);
        assert_eq!(found["problems"].as_array().unwrap().len(), 0);
        if format != "bf16" {
            assert_eq!(found["modules"], distances, "{format}");
            assert_eq!(eval_counting(&output, &original), expected, "{format}");
        }
        let card = std::fs::read_to_string(output.join("README.md")).unwrap();
        assert!(card.contains(&format!("# {format}\n")), "{card}");
        assert!(
            card.contains("4 bits, asymmetric, in groups of 64"),
            "{card}"
        );
    }
}

/// A folder of GGUF files is read as what it was made of: same answers, and the same codes in every
/// format that it is turned into.
#[test]
fn a_folder_of_gguf_files_is_the_same_model() {
    let (home, first) = home(&["--bits", "3"]);
    let original = repository("testbed/model");
    let folder = home.path().join("gguf");
    let done = export(&first, "gguf", &folder, &["--json"]);
    assert_eq!(
        json(&done.stdout)["gguf"]["rounding"]["n_scales_rounded"],
        0
    );
    assert_eq!(
        eval_counting(&folder, &original),
        eval_counting(&first, &original)
    );
    let inspected = vlmq().arg("inspect").arg(&folder).output().unwrap();
    let inspected = text(&inspected.stdout);
    assert!(
        inspected.contains("28 modules already, gguf"),
        "{inspected}"
    );
    let distances = verify(&first, 0)["modules"].take();
    for format in ["compressed-tensors", "gptq", "gguf"] {
        let output = home.path().join(format!("again-{format}"));
        let done = export(&folder, format, &output, &[]);
        assert!(done.status.success(), "{format}: {}", text(&done.stderr));
        match format {
            "gguf" => drop(verify(&output, 0)),
            _ => assert_eq!(verify(&output, 0)["modules"], distances, "{format}"),
        }
        let card = std::fs::read_to_string(output.join("README.md")).unwrap();
        assert!(
            card.contains("3 bits, asymmetric, in groups of 64"),
            "{card}"
        );
    }
}

/// GGUF files against what they are made of, and against the original.
#[test]
fn gguf_files_are_held_against_both_sources() {
    let (home, first) = home(&["--bits", "4"]);
    let output = home.path().join("gguf");
    let done = export(&first, "gguf", &output, &["--json"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let against_original = verify(&output, 0);
    assert_eq!(against_original["format"], "gguf");
    assert_eq!(against_original["n_quantized"], 28);
    let distances = against_original["modules"].as_array().unwrap();
    assert_eq!(distances.len(), 28);
    assert!(distances[0]["relative_error"].as_f64().unwrap() > 0.01);
    let mut command = vlmq();
    command.arg("verify").arg(&output).arg("--against");
    let same = command.arg(&first).arg("--json").output().unwrap();
    let same = json(&same.stdout)["verification"].take();
    assert_eq!(same["modules"].as_array().unwrap().len(), 0);
    assert_eq!(same["problems"].as_array().unwrap().len(), 0);
    let card = std::fs::read_to_string(output.join("README.md")).unwrap();
    assert!(card.contains("--mmproj gguf/mmproj-BF16.gguf"), "{card}");
    let path = output.join("model-Q4_1.gguf");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 33;
    bytes[last] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    std::fs::remove_file(output.join("mmproj-BF16.gguf")).unwrap();
    let broken = verify(&output, 1)["problems"].to_string();
    assert!(broken.contains("mmproj-*.gguf: is not there"), "{broken}");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let cut = verify(&output, 1)["problems"].to_string();
    assert!(cut.contains("model-Q4_1.gguf"), "{cut}");
}

#[test]
fn a_run_can_write_any_format() {
    for (format, key) in [("gptq", "qweight"), ("mlx", "scales"), ("f16", "weight")] {
        let (_home, folder) = home(&["--bits", "3", "--format", format]);
        verify(&folder, 0);
        let weights = std::fs::read(folder.join("model.safetensors")).unwrap();
        let read = safetensors::SafeTensors::deserialize(&weights).unwrap();
        read.tensor(&format!("model.layers.0.mlp.down_proj.{key}"))
            .unwrap();
    }
}

#[test]
fn what_cannot_be_held_is_refused_before_any_work() {
    let (home, folder) = home(&["--bits", "3", "--group-size", "-1"]);
    let output = home.path().join("out");
    for (format, expected) in [
        ("awq", "3 bits, of which it has 4 only"),
        ("mlx", "per channel"),
        ("gguf2", "one of compressed-tensors, gptq"),
        ("q4", "one of"),
    ] {
        let done = export(&folder, format, &output, &[]);
        assert_eq!(done.status.code(), Some(2));
        let told = text(&done.stderr);
        assert!(told.contains(expected), "{told}");
        assert!(!output.exists());
    }
    let original = repository("testbed/model");
    let told = text(&export(&original, "gptq", &output, &[]).stderr);
    assert!(told.contains("use `vlmq quantize` first"), "{told}");
    let arguments = ["--format", "awq", "--bits", "3", "--dry-run"];
    let planned = quantize(&original, &output, &arguments);
    assert_eq!(planned.status.code(), Some(2));
    let told = text(&export(&folder, "gptq", home.path(), &[]).stderr);
    assert!(told.contains("exists already"), "{told}");
}

#[test]
fn what_is_wrong_with_a_folder_is_told() {
    let (home, first) = home(&["--bits", "4"]);
    let folder = home.path().join("gptq");
    assert!(export(&first, "gptq", &folder, &[]).status.success());
    std::fs::remove_file(folder.join("preprocessor_config.json")).unwrap();
    let config = folder.join("config.json");
    let told = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, told.replace("-:.*visual.*", "-:.*layers.*")).unwrap();
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (n_header, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let scales = header.info("model.layers.0.mlp.up_proj.scales").unwrap();
    let at = 8 + n_header + scales.data_offsets.0;
    bytes[at..at + 2].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let found = verify(&folder, 1);
    let problems = found["problems"].as_array().unwrap();
    let problems: Vec<&str> = problems.iter().filter_map(Value::as_str).collect();
    for expected in [
        "preprocessor_config.json: is beside",
        "up_proj.scales: 1 value(s) are NaN",
        "up_proj: is quantized, but config.json leaves it out",
        "quantize_config.json: differs",
    ] {
        let is_told = problems.iter().any(|problem| problem.contains(expected));
        assert!(is_told, "{expected} in {problems:#?}");
    }
}

/// The card keeps what an evaluation said, and the card of the model that was quantized.
#[test]
fn a_card_tells_what_was_measured() {
    let (home, first) = home(&["--bits", "4"]);
    std::fs::write(
        first.join("README_base_model.md"),
        "---\nlicense: apache-2.0\n---\n",
    )
    .unwrap();
    let scores = home.path().join("scores.json");
    let told = r#"{"tasks": {"counting": {"accuracy":
        {"n": 40, "percent": 55.0, "interval": [39.8, 69.3]}, "kl_per_answer_token": 0.0125}}}"#;
    std::fs::write(&scores, told).unwrap();
    let output = home.path().join("gptq");
    let evaluation = ["--evaluation", scores.to_str().unwrap()];
    let done = export(&first, "gptq", &output, &evaluation);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let card = std::fs::read_to_string(output.join("README.md")).unwrap();
    for expected in [
        "license: apache-2.0\n",
        "| counting | 40 | 55.0 (39.8 to 69.3) |  | 0.0125 |",
        "vllm serve gptq",
    ] {
        assert!(card.contains(expected), "{expected} in {card}");
    }
    assert!(output.join("README_base_model.md").exists());
    let broken = home.path().join("broken.json");
    std::fs::write(&broken, "{").unwrap();
    let bad = ["--evaluation", broken.to_str().unwrap()];
    let done = export(&first, "gptq", &home.path().join("other"), &bad);
    assert_eq!(done.status.code(), Some(2));
}

/// What `quantize --format gguf` writes is what `export` makes of the same codes.
#[test]
fn a_run_can_write_gguf() {
    let (home, first) = home(&["--bits", "4"]);
    let exported = home.path().join("exported");
    assert!(export(&first, "gguf", &exported, &[]).status.success());
    let output = home.path().join("direct");
    let arguments = ["--method", "rtn", "--bits", "4", "--format", "gguf"];
    let made = quantize(&repository("testbed/model"), &output, &arguments);
    assert!(made.status.success(), "{}", text(&made.stderr));
    verify(&output, 0);
    for name in ["model-Q4_1.gguf", "mmproj-BF16.gguf"] {
        let size = |folder: &Path| std::fs::metadata(folder.join(name)).unwrap().len();
        // The name of the source is in the file, and not the same.
        assert!(size(&output).abs_diff(size(&exported)) < 4096, "{name}");
    }
    for name in ["README.md", "vlmq_report.json"] {
        assert!(output.join(name).exists(), "{name}");
    }
    let left = std::fs::read_dir(home.path()).unwrap().count();
    assert_eq!(left, 3, "nothing of the way there is left");
    let refused = ["--bits", "8", "--format", "gguf", "--dry-run"];
    let planned = quantize(
        &repository("testbed/model"),
        &home.path().join("no"),
        &refused,
    );
    assert_eq!(planned.status.code(), Some(2), "{}", text(&planned.stdout));
}
