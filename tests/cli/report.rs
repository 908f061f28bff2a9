//! `vlmq report`, and `vlmq quantize --report`, which leaves the page beside the model.

use super::bad_input::assert_clear_failure;
use super::{quantize, repository, text, vlmq};
use base64::Engine;
use serde_json::Value;
use std::path::Path;
use std::process::Output;

fn report(folder: &Path, more: &[&str]) -> Output {
    vlmq()
        .arg("report")
        .arg(folder)
        .args(more)
        .output()
        .unwrap()
}

fn read(folder: &Path, name: &str) -> String {
    let path = folder.join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Weights of one role in one layer for the first kept sample.
fn weights(importance: &Value, layer: usize, role: &str) -> Option<Vec<f32>> {
    let kept = importance["layers"][layer].as_array().unwrap();
    let kept = kept.iter().find(|kept| kept["projection"] == role)?;
    let text = kept["samples"][0].as_str().unwrap();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    let numbers = bytes.as_chunks::<2>().0.iter();
    Some(
        numbers
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect(),
    )
}

#[test]
fn a_run_leaves_its_page_and_the_command_makes_the_same() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let flags = ["--report", "--method", "vlmq", "--bits", "3"];
    let run = quantize(&repository("testbed/model"), &output, &flags);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let page = read(&output, "report.html");
    for told in [
        "<h1>out</h1>",
        "model by vlmq: 3 bits, groups of 64",
        "--samples 4",
        "Tokens weigh alike",
    ] {
        assert!(page.contains(told), "{told}");
    }
    assert!(
        !page.contains(home.path().to_str().unwrap()),
        "it tells where folders lie"
    );
    let told: Value = serde_json::from_str(&read(&output, "vlmq_report.json")).unwrap();
    let modules = told["modules"].as_array().unwrap();
    let (mut own, mut nearest) = (0.0, 0.0);
    for module in modules {
        own += module["loss"].as_f64().unwrap();
        nearest += module["nearest_loss"].as_f64().unwrap();
    }
    assert!(
        own < 0.8 * nearest,
        "{own} is hardly less than rounding's {nearest}"
    );
    assert_eq!(
        told["output"]["tensor_bytes"].as_u64(),
        tensor_bytes(&output)
    );

    let again = report(&output, &[]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert!(
        read(&output, "report.html") == page,
        "another page of the same folder"
    );
    let elsewhere = home.path().join("page.html");
    report(&output, &["--output", elsewhere.to_str().unwrap()]);
    assert!(std::fs::read_to_string(elsewhere).unwrap() == page);
    let markdown = text(&report(&output, &["--markdown"]).stdout);
    assert!(markdown.starts_with("# out\n"), "{markdown:.40}");
    assert!(
        markdown.contains("| 3 | 3 | 3 | 3 | 3 | 3 | 3 | 3 |"),
        "{markdown}"
    );
}

fn tensor_bytes(folder: &Path) -> Option<u64> {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(path).ok()?;
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    Some(bytes.len() as u64 - 8 - header)
}

#[test]
fn the_weights_that_are_drawn_are_those_of_the_run() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let flags = ["--report", "--samples", "2", "--bits", "3"];
    let run = quantize(&repository("testbed/model"), &output, &flags);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let importance: Value = serde_json::from_str(&read(&output, "vlmq_importance.json")).unwrap();
    let samples = importance["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2, "all that there are");
    let runs = samples[0]["runs"].as_array().unwrap();
    let n_tokens: u64 = runs
        .iter()
        .map(|run| run["n_tokens"].as_u64().unwrap())
        .sum();
    let of_vision = runs.iter().find(|run| run["class"] == "vision").unwrap();
    let image = &samples[0]["images"][0];
    let grid = &image["grids"][0];
    let cells = grid["rows"].as_u64().unwrap() * grid["cols"].as_u64().unwrap();
    assert_eq!(
        (of_vision["n_tokens"].as_u64(), cells),
        (image["n_tokens"].as_u64(), 36)
    );
    let said: Vec<&str> = runs
        .iter()
        .flat_map(|run| run["texts"].as_array().unwrap())
        .filter_map(Value::as_str)
        .collect();
    assert!(
        said.concat()
            .starts_with("<|im_start|>user\n<|vision_start|><|vision_end|>"),
        "{said:?}"
    );
    assert!(
        weights(&importance, 0, "self_attn.q_proj").is_none(),
        "nothing is quantized before"
    );
    let told: Value = serde_json::from_str(&read(&output, "vlmq_report.json")).unwrap();
    let of = |weights: &[f32]| {
        let sums = weights.iter().map(|w| f64::from(*w));
        sums.clone().sum::<f64>().powi(2) / sums.map(|w| w * w).sum::<f64>()
    };
    for layer in 1..4 {
        let own = weights(&importance, layer, "self_attn.v_proj").unwrap();
        assert_eq!(own.len() as u64, n_tokens);
        // The other sample's weights come on top in the run's own number.
        let name = format!("model.layers.{layer}.self_attn.v_proj");
        let modules = told["modules"].as_array().unwrap();
        let module = modules.iter().find(|m| m["name"] == name.as_str()).unwrap();
        let whole = module["effective_sample_size"].as_f64().unwrap();
        assert!(
            of(&own) > 1.0 && of(&own) < whole + own.len() as f64,
            "{} of {whole}",
            of(&own)
        );
    }
}

#[test]
fn methods_without_weights_say_so() {
    let home = tempfile::tempdir().unwrap();
    for (method, why) in [
        ("rtn", "looks at no samples"),
        ("gptq", "counts all tokens alike"),
    ] {
        let output = home.path().join(method);
        let run = quantize(
            &repository("testbed/model"),
            &output,
            &["--report", "--method", method],
        );
        assert!(run.status.success(), "{}", text(&run.stderr));
        assert!(read(&output, "report.html").contains(why), "{method}");
        assert!(!output.join("vlmq_importance.json").exists(), "{method}");
    }
    let plain = home.path().join("plain");
    quantize(&repository("testbed/model"), &plain, &["--bits", "3"]);
    assert!(!plain.join("report.html").exists() && !plain.join("vlmq_importance.json").exists());
    report(&plain, &[]);
    let page = read(&plain, "report.html");
    assert!(page.contains("kept no token weights") && page.contains("was not measured"));
}

#[test]
fn gguf_folders_have_the_page_too() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let flags = [
        "--report",
        "--format",
        "gguf",
        "--bits",
        "4",
        "--group-size",
        "32",
    ];
    let run = quantize(&repository("testbed/model"), &output, &flags);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(read(&output, "report.html").contains("id=\"importance\""));
    let told: Value = serde_json::from_str(&read(&output, "vlmq_report.json")).unwrap();
    assert_eq!(told["output"]["format"], "gguf");
    let files = std::fs::read_dir(&output)
        .unwrap()
        .map(|entry| entry.unwrap());
    let gguf = files.filter(|file| file.path().extension().is_some_and(|e| e == "gguf"));
    let size: u64 = gguf.map(|file| file.metadata().unwrap().len()).sum();
    let tensors = told["output"]["tensor_bytes"].as_u64().unwrap();
    assert!(tensors < size && tensors > size / 2, "{tensors} of {size}");
}

#[test]
fn bad_folders_and_files_are_clear_errors() {
    let home = tempfile::tempdir().unwrap();
    let empty = home.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert_clear_failure(
        &report(&empty, &[]),
        &["vlmq_report.json", "empty"],
        &empty,
        0,
    );
    std::fs::write(empty.join("vlmq_report.json"), "{").unwrap();
    assert_clear_failure(
        &report(&empty, &[]),
        &["vlmq_report.json", "JSON"],
        &empty,
        1,
    );
    let output = home.path().join("out");
    quantize(
        &repository("testbed/model"),
        &output,
        &["--bits", "3", "--report"],
    );
    let path = output.join("vlmq_importance.json");
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        whole.replacen("\"n_tokens\":36", "\"n_tokens\":35", 1),
    )
    .unwrap();
    let failed = report(&output, &[]);
    assert_eq!(failed.status.code(), Some(2));
    assert!(
        text(&failed.stderr).contains("do not add up"),
        "{}",
        text(&failed.stderr)
    );
}
