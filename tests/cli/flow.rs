//! From the bundled model to a written folder and its answers.

use super::{eval_counting, json, quantize, repository, text, vlmq};
use serde_json::Value;
use std::path::Path;

#[test]
fn every_method_writes_a_folder_that_answers() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    for (method, bits) in [
        ("rtn", "4"),
        ("gptq", "3"),
        ("gptaq", "4"),
        ("qronos", "3"),
        ("vlmq-v1", "3"),
        ("vlmq-v2", "2"),
        ("vlmq", "2"),
    ] {
        let output = home.path().join(method);
        let run = quantize(
            &model,
            &output,
            &["--method", method, "--bits", bits, "--json"],
        );
        assert!(run.status.success(), "{method}: {}", text(&run.stderr));
        let report = &json(&run.stdout)["report"];
        assert_eq!(report["method"], method);
        let modules = report["modules"].as_array().unwrap();
        assert_eq!(modules.len(), 28);
        let written: Value = json(&std::fs::read(output.join("vlmq_report.json")).unwrap());
        assert_eq!(&written, report);
        if method.starts_with("vlmq") {
            let is_uniform = |d: &&Value| d["kind"] == "uniform_weights";
            let deviations = report["deviations"].as_array().unwrap();
            let uniform: Vec<&Value> = deviations.iter().filter(is_uniform).collect();
            assert_eq!(uniform.len(), 4, "q, k, v and o of the first layer only");
            assert!(uniform.iter().all(|d| d["layer_idx"] == 0));
        }
        let task = eval_counting(&output, &model);
        assert_eq!(task["accuracy"]["n"], 3);
        assert!(task["kl_per_answer_token"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn side_files_are_copied_and_bytes_do_not_depend_on_threads() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let write = |name: &str, threads: &str| {
        let output = home.path().join(name);
        let run = quantize(&model, &output, &["--bits", "3", "--threads", threads]);
        assert!(run.status.success(), "{}", text(&run.stderr));
        std::fs::read(output.join("model.safetensors")).unwrap()
    };
    assert!(
        write("one", "1") == write("three", "3"),
        "threads change the weights"
    );
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert_eq!(read(&model), read(&home.path().join("one")), "{name}");
    }
}

/// The log has a line for each layer and each module, with what a user wants to see grow.
#[test]
fn the_log_tells_layers_and_modules() {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("log.jsonl");
    let flags = ["--bits", "3", "-v", "--log", log.to_str().unwrap()];
    let run = quantize(
        &repository("testbed/model"),
        &home.path().join("out"),
        &flags,
    );
    let words = text(&run.stderr);
    assert!(run.status.success(), "{words}");
    assert_eq!(words.matches("layer done").count(), 4, "{words}");
    assert_eq!(words.matches("module done").count(), 0, "{words}");
    let log = std::fs::read(log).unwrap();
    let lines = log.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let lines: Vec<Value> = lines.map(json).collect();
    let of = |message: &'static str| lines.iter().filter(move |l| l["message"] == message);
    assert_eq!(of("module done").count(), 28);
    assert_eq!(of("layer done").count(), 4);
    for (layer_idx, line) in of("layer done").enumerate() {
        assert_eq!(line["layer"], layer_idx);
        for field in [
            "relative_loss",
            "dampening_frac",
            "effective_sample_size",
            "seconds",
            "peak_memory_bytes",
        ] {
            assert!(
                line[field].as_f64().is_some_and(|v| v > 0.0),
                "{field}: {line}"
            );
        }
    }
}

#[test]
fn rules_skip_modules_and_change_bits() {
    let home = tempfile::tempdir().unwrap();
    let rules = home.path().join("recipe.toml");
    let toml = "[[rule]]\npattern = 'layers\\.0\\.'\nskip = true\n\
                [[rule]]\npattern = 'down_proj'\nbits = 8\n";
    std::fs::write(&rules, toml).unwrap();
    let output = home.path().join("out");
    let flags = ["--bits", "3", "--json", "--recipe", rules.to_str().unwrap()];
    let run = quantize(&repository("testbed/model"), &output, &flags);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report = &json(&run.stdout)["report"];
    for module in report["modules"].as_array().unwrap() {
        let expected = match (module["layer_idx"].as_u64(), module["name"].as_str()) {
            (Some(0), _) => Value::Null,
            (_, Some(name)) if name.ends_with("down_proj") => 8.into(),
            _ => 3.into(),
        };
        assert_eq!(module["scheme"]["bits"], expected, "{}", module["name"]);
    }
    let skipped = report["deviations"].as_array().unwrap().iter();
    assert_eq!(skipped.filter(|d| d["kind"] == "skipped").count(), 7);
}

#[test]
fn a_dry_run_writes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let run = quantize(
        &repository("testbed/model"),
        &output,
        &["--dry-run", "--json"],
    );
    assert!(run.status.success(), "{}", text(&run.stderr));
    let plan = json(&run.stdout);
    assert_eq!(plan["n_samples"], 4);
    assert!(plan["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn inspect_and_generate_speak_json() {
    let model = repository("testbed/model");
    let inspect = vlmq()
        .arg("inspect")
        .arg(&model)
        .arg("--json")
        .output()
        .unwrap();
    assert_eq!(json(&inspect.stdout)["n_modules"], 28);
    let home = tempfile::tempdir().unwrap();
    let picture = home.path().join("picture.png");
    image::RgbImage::from_pixel(90, 50, image::Rgb([250, 240, 230]))
        .save(&picture)
        .unwrap();
    let generate = vlmq()
        .arg("generate")
        .arg(&model)
        .arg("--image")
        .arg(&picture)
        .args([
            "--prompt",
            "how many shapes are there?",
            "--json",
            "--max-new-tokens",
            "4",
        ])
        .output()
        .unwrap();
    let answer = json(&generate.stdout);
    assert_eq!(answer["command"], "generate");
    assert!(answer["output_ids"].as_array().unwrap().len() <= 4);
}

/// Ctrl-C in the middle of a run: exit code 2, and neither output nor anything half-written.
#[test]
#[cfg(unix)]
fn an_interrupted_run_leaves_nothing() {
    interrupt("-INT");
}

/// As a job scheduler does it.
#[test]
#[cfg(unix)]
fn a_terminated_run_leaves_nothing() {
    interrupt("-TERM");
}

#[cfg(unix)]
fn interrupt(signal: &str) {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let mut child = vlmq()
        .arg("quantize")
        .arg(repository("testbed/model"))
        .arg("--calibration")
        .arg(repository("testbed/calibration"))
        .args(["--samples", "400", "--group-size", "64", "--output"])
        .arg(&output)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = lines
        .by_ref()
        .map_while(Result::ok)
        .find(|line| line.starts_with("layer"));
    assert_eq!(first.as_deref(), Some("layer 1 of 4"));
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args([signal, &pid])
            .status()
            .unwrap()
            .success()
    );
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(2), "{rest:?}");
    assert!(
        rest.iter().any(|line| line.contains("interrupted")),
        "{rest:?}"
    );
    assert!(!output.exists());
    let n_left = std::fs::read_dir(home.path()).unwrap().count();
    let kept = rest.iter().any(|line| line.contains("are kept in"));
    assert_eq!(n_left, usize::from(kept), "{rest:?}");
}
