//! From one format to another, and looking at what was written, with the real program.

use super::{eval_counting, json, model_copy, quantize, repository, text, vlmq};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use tempfile::TempDir;

/// A home with the bundled model rounded to a grid.
pub(super) fn home(more: &[&str]) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("quantized");
    let arguments = [&["--method", "rtn"], more].concat();
    let made = quantize(&repository("testbed/model"), &output, &arguments);
    assert!(made.status.success(), "{}", text(&made.stderr));
    (home, output)
}

pub(super) fn export(from: &Path, format: &str, to: &Path, more: &[&str]) -> Output {
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

/// `inspect` and `generate` say the same of every form of the same codes.
#[test]
fn every_format_is_inspected_and_generates_alike() {
    let (home, first) = home(&["--bits", "4"]);
    let picture = home.path().join("picture.png");
    let pixel = |x, y| image::Rgb([(2 * x) as u8, (3 * y) as u8, 90]);
    let pixels = image::RgbImage::from_fn(90, 50, pixel);
    pixels.save(&picture).unwrap();
    let generated = |folder: &Path| {
        let mut command = vlmq();
        command
            .arg("generate")
            .arg(folder)
            .arg("--image")
            .arg(&picture);
        command.args([
            "--prompt",
            "what is this?",
            "--max-new-tokens",
            "6",
            "--json",
        ]);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        json(&done.stdout)["output_ids"].take()
    };
    let expected = generated(&first);
    assert!(!expected.as_array().unwrap().is_empty());
    let formats = [
        ("gptq", 28),
        ("awq", 28),
        ("mlx", 28),
        ("gguf", 28),
        ("f32", 0),
        ("bf16", 0),
    ];
    for (format, n_quantized) in formats {
        let folder = home.path().join(format);
        let done = export(&first, format, &folder, &[]);
        assert!(done.status.success(), "{format}: {}", text(&done.stderr));
        let inspected = vlmq().arg("inspect").arg(&folder).arg("--json").output();
        let inspected = json(&inspected.unwrap().stdout);
        assert_eq!(inspected["n_modules"], 28, "{format}");
        assert_eq!(inspected["n_quantized_modules"], n_quantized, "{format}");
        let found = generated(&folder);
        // bfloat16 rounds each weight, GGUF each asymmetric block's offset.
        match format {
            "bf16" | "gguf" => assert!(!found.as_array().unwrap().is_empty()),
            _ => assert_eq!(found, expected, "{format}"),
        }
    }
}

/// Where a layer, or a linear of one, has no codes, optimum's GPTQ has no room for it.
#[test]
fn a_plain_linear_among_coded_ones_is_noted_for_gptq() {
    for (pattern, plain) in [
        ("layers\\.1\\.", "model.layers.1.mlp.down_proj"),
        ("layers\\.2\\.mlp\\.up_proj", "model.layers.2.mlp.up_proj"),
        ("mlp\\.up_proj", ""),
    ] {
        let recipes = tempfile::tempdir().unwrap();
        let recipe = recipes.path().join("recipe.toml");
        let rule = format!("[[rule]]\npattern = '{pattern}'\nskip = true\n");
        std::fs::write(&recipe, rule).unwrap();
        let recipe = recipe.to_str().unwrap();
        let (home, first) = home(&["--bits", "4", "--symmetric", "--recipe", recipe]);
        let folder = home.path().join("gptq");
        let done = export(&first, "gptq", &folder, &["--json"]);
        let notes = json(&done.stdout)["notes"].take();
        let card = std::fs::read_to_string(folder.join("README.md")).unwrap();
        let refused = card.contains("transformers: no, optimum puts codes into every layer");
        match plain {
            // Left out in every layer: optimum is told so.
            "" => assert_eq!((notes.as_array().unwrap().len(), refused), (0, false)),
            _ => {
                let note = notes[0].as_str().unwrap();
                assert!(note.contains(plain) && note.contains("optimum"), "{note}");
                assert!(refused, "{card}");
            }
        }
        verify(&folder, 0);
        let written = text(&export(&first, "gptq", &home.path().join("words"), &[]).stdout);
        assert_eq!(written.contains("note: transformers does not"), refused);
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
    let bits = "In `model-Q4_1.gguf` they take 5.00 bits a weight (28 Q4_1).";
    assert!(card.contains(bits), "{card}");
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
        "The model that was quantized is `model`.",
        "vlmq quantize",
        "| counting | 40 | 55.0 (39.8 to 69.3) |  | 0.0125 |",
        "vllm serve gptq",
    ] {
        assert!(card.contains(expected), "{expected} in {card}");
    }
    assert!(!card.contains("not measured") && !card.contains("base_model:"));
    let card = std::fs::read_to_string(first.join("README.md")).unwrap();
    assert!(card.contains("Answers: not measured."), "{card}");
    assert!(output.join("README_base_model.md").exists());
    let broken = home.path().join("broken.json");
    std::fs::write(&broken, "{").unwrap();
    let bad = ["--evaluation", broken.to_str().unwrap()];
    let done = export(&first, "gptq", &home.path().join("other"), &bad);
    assert_eq!(done.status.code(), Some(2));
}

/// The published name of a model goes from its configuration to the card, and from card to card.
#[test]
fn a_card_names_the_published_model() {
    let home = tempfile::tempdir().unwrap();
    let source = model_copy(home.path());
    let path = source.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let named = config.replacen('{', "{\"_name_or_path\": \"some/Small-VL\",", 1);
    std::fs::write(&path, named).unwrap();
    let first = home.path().join("quantized");
    let made = quantize(&source, &first, &["--method", "rtn", "--bits", "4"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let output = home.path().join("gguf");
    assert!(export(&first, "gguf", &output, &[]).status.success());
    for folder in [&first, &output] {
        let card = std::fs::read_to_string(folder.join("README.md")).unwrap();
        for expected in [
            "base_model: some/Small-VL\nbase_model_relation: quantized\n",
            "[some/Small-VL](https://huggingface.co/some/Small-VL)",
        ] {
            assert!(card.contains(expected), "{card}");
        }
    }
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
