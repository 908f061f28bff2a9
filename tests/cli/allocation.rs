//! A mean of bits shared out among the modules of the bundled model.

use super::{eval_counting, json, quantize, repository, text, vlmq};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

fn bits_of<'a>(modules: &'a [Value], name: &str) -> &'a Value {
    let module = modules.iter().find(|m| m["name"] == name);
    &module.unwrap_or_else(|| panic!("{name}"))["scheme"]["bits"]
}

fn tensor_bytes(model: &Path) -> u64 {
    let inspect = vlmq()
        .arg("inspect")
        .arg(model)
        .arg("--json")
        .output()
        .unwrap();
    json(&inspect.stdout)["tensor_bytes"].as_u64().unwrap()
}

/// Of the formats in the folder's configuration.
fn written_widths(folder: &Path) -> BTreeSet<u64> {
    let config = json(&std::fs::read(folder.join("config.json")).unwrap());
    let formats = &config["quantization_config"]["config_groups"];
    let formats = formats.as_object().unwrap().values();
    let widths = formats.map(|f| f["weights"]["num_bits"].as_u64().unwrap());
    widths.collect()
}

#[test]
fn a_mean_of_bits_is_kept_reported_and_read_back() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (repository("testbed/model"), home.path().join("out"));
    let run = quantize(&model, &output, &["--bits", "2.5", "--json"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let printed = json(&run.stdout);
    let report = &printed["report"];
    assert_eq!(report["settings"]["bits"], 2.5);
    let allocation = &report["allocation"];
    let mean = allocation["code_bits_per_weight"].as_f64().unwrap();
    assert!((2.45..=2.5).contains(&mean), "{mean}");

    let modules = report["modules"].as_array().unwrap();
    let groups = allocation["groups"].as_array().unwrap();
    let (mut code_bits, mut n_weights, mut n_modules) = (0, 0, 0);
    let mut widths = BTreeSet::new();
    for group in groups {
        let names = group["modules"].as_array().unwrap();
        for name in names {
            assert_eq!(
                bits_of(modules, name.as_str().unwrap()),
                &group["bits"],
                "{name}"
            );
        }
        let (bits, n) = (
            group["bits"].as_u64().unwrap(),
            group["n_weights"].as_u64().unwrap(),
        );
        widths.insert(bits);
        n_modules += names.len();
        n_weights += n;
        code_bits += n * bits;
    }
    assert_eq!((groups.len(), n_modules), (16, 28));
    assert!((code_bits as f64 / n_weights as f64 - mean).abs() < 1e-9);

    // bf16 weights give way to codes, scales, zero points and a shape of two i64.
    let stored = allocation["stored_bytes"].as_u64().unwrap();
    let expected = tensor_bytes(&model) - 2 * n_weights + stored + 28 * 16;
    assert_eq!(printed["tensor_bytes"].as_u64(), Some(expected));
    assert_eq!(tensor_bytes(&output), expected);

    assert_eq!(written_widths(&output), widths);
    assert!(widths.len() > 1);

    let kl = eval_counting(&output, &model)["kl_per_answer_token"].as_f64();
    assert!(kl.is_some_and(|kl| kl > 0.0 && kl < 1.0), "{kl:?}");
}

#[test]
fn shared_bits_do_not_depend_on_threads() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, threads: &str| {
        let output = home.path().join(name);
        let flags = ["--bits", "2.75", "--method", "gptq", "--threads", threads];
        let run = quantize(&repository("testbed/model"), &output, &flags);
        assert!(run.status.success(), "{}", text(&run.stderr));
        let read = |file: &str| std::fs::read(output.join(file)).unwrap();
        (read("model.safetensors"), read("config.json"))
    };
    assert!(
        write("one", "1") == write("three", "3"),
        "threads change the bits"
    );
}

#[test]
fn what_is_shared_out_is_told_beforehand_and_afterwards() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let flags = ["--bits", "2.25", "--method", "gptq"];
    let quantize = |more: &[&str]| {
        let flags = [&flags[..], more].concat();
        let run = quantize(&repository("testbed/model"), &output, &flags);
        assert!(run.status.success(), "{}", text(&run.stderr));
        run.stdout
    };
    let plan = text(&quantize(&["--dry-run"]));
    assert!(plan.contains("2.25 on average at most"), "{plan}");
    let plan = json(&quantize(&["--dry-run", "--json"]));
    assert_eq!(plan["n_modules_with_shared_bits"], 28);
    let said = text(&quantize(&[]));
    assert!(said.contains("on average of at most 2.25"), "{said}");
    assert!(said.contains("q k v "), "{said}");
    let (planned, written) = (
        plan["disk_bytes"].as_f64().unwrap(),
        tensor_bytes(&output) as f64,
    );
    assert!(
        (planned / written - 1.0).abs() < 0.01,
        "{planned} {written}"
    );
}
