//! Calibration apart from quantization: shards of statistics, added up, and models solved from them.

use super::bad_input::assert_clear_failure;
use super::resume::{assert_same, files};
use super::{json, model_copy, quantize, repository, text, vlmq};
use std::path::{Path, PathBuf};
use std::process::Output;
use vlmq::checkpoint::Checkpoint;

fn calibrate(model: &Path, output: &Path, more: &[&str]) -> Output {
    vlmq()
        .arg("calibrate")
        .arg(model)
        .arg("--calibration")
        .arg(repository("testbed/calibration"))
        .args(["--samples", "64", "--output"])
        .arg(output)
        .args(more)
        .output()
        .unwrap()
}

fn merge(folders: &[PathBuf], output: &Path) -> Output {
    let mut command = vlmq();
    command
        .arg("merge")
        .args(folders)
        .arg("--output")
        .arg(output);
    command.arg("--json").output().unwrap()
}

fn quantize_from(model: &Path, statistics: &Path, output: &Path, more: &[&str]) -> Output {
    vlmq()
        .arg("quantize")
        .arg(model)
        .arg("--statistics")
        .arg(statistics)
        .args(["--bits", "3", "--group-size", "64", "--output"])
        .arg(output)
        .args(more)
        .output()
        .unwrap()
}

fn good(run: Output) -> Output {
    assert!(run.status.success(), "{}", text(&run.stderr));
    run
}

fn shards(model: &Path, home: &Path, n: usize, more: &[&str]) -> Vec<PathBuf> {
    let made = (1..=n).map(|i| {
        let output = home.join(format!("shard-{i}"));
        let shard = format!("{i}/{n}");
        good(calibrate(
            model,
            &output,
            &[&["--shard", &shard], more].concat(),
        ));
        output
    });
    made.collect()
}

/// The first layer's q, k and v see the embeddings, quantized or not: their statistics are those of an
/// ordinary run with as many shards, to the bit, and so are their codes.
#[test]
fn shards_added_up_are_what_a_run_would_have_summed() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let parts = shards(&model, home.path(), 2, &[]);
    let (all, again) = (home.path().join("all"), home.path().join("again"));
    let merged = json(&good(merge(&parts, &all)).stdout);
    assert_eq!(merged["missing_shards"].as_array().map(Vec::len), Some(0));
    let backwards = [parts[1].clone(), parts[0].clone()];
    good(merge(&backwards, &again));
    assert_same(&again, &files(&all), "added up the other way round");

    let from = home.path().join("from");
    good(quantize_from(&model, &all, &from, &["--method", "gptq"]));
    let ordinary = home.path().join("ordinary");
    let settings = [
        "--method",
        "gptq",
        "--bits",
        "3",
        "--samples",
        "64",
        "--shards",
        "2",
    ];
    good(quantize(&model, &ordinary, &settings));
    let [from, ordinary] = [from, ordinary].map(|dir| Checkpoint::open(&dir).unwrap());
    let is_first = |name: &&str| {
        let roles = ["q_proj", "k_proj", "v_proj"];
        name.contains("layers.0.") && roles.iter().any(|role| name.contains(role))
    };
    let names: Vec<&str> = ordinary.names().filter(is_first).collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        assert!(
            from.bytes(name).unwrap() == ordinary.bytes(name).unwrap(),
            "{name}"
        );
    }
    let last = "model.layers.3.mlp.down_proj.weight_packed";
    assert!(from.bytes(last).unwrap() != ordinary.bytes(last).unwrap());
}

/// One calibration serves all number formats and goes on after a stop, with importance too.
#[test]
fn one_calibration_serves_many_runs() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let weighted = ["--method", "vlmq-v2", "--set", "importance_loss=answer"];
    let parts = shards(&model, home.path(), 3, &weighted);
    let statistics = home.path().join("all");
    good(merge(&parts, &statistics));
    for (bits, more) in [("2", "alpha=0"), ("4", "alpha=0")] {
        let output = home.path().join(bits);
        let more = [&weighted[..], &["--set", more, "--bits", bits, "--json"]].concat();
        let mut command = vlmq();
        command
            .arg("quantize")
            .arg(&model)
            .arg("--statistics")
            .arg(&statistics);
        let run = command.args(&more).args(["--group-size", "64", "--output"]);
        let run = good(run.arg(&output).output().unwrap());
        let modules = json(&run.stdout)["report"]["modules"].take();
        let modules = modules.as_array().unwrap();
        assert_eq!(modules.len(), 28);
        // Weights are there: fewer effective tokens than tokens.
        let ess = modules[0]["effective_sample_size"].as_f64().unwrap();
        assert!(ess > 1.0 && ess < 1400.0, "{ess}");
        let verified = vlmq().arg("verify").arg(&output).output().unwrap();
        good(verified);
    }
}

#[test]
fn statistics_that_do_not_fit_are_refused_before_any_work() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let parts = shards(&model, home.path(), 2, &[]);
    let output = home.path().join("out");
    let kept = 2;
    let fails = |run: Output, expected: &[&str], kept: usize| {
        assert_clear_failure(&run, expected, home.path(), kept);
    };
    let gptq = ["--method", "gptq"];
    let run = quantize_from(&model, &parts[0], &output, &gptq);
    fails(run, &["1 of 2 shards are missing", "shard 2"], kept);
    fails(
        merge(&[parts[0].clone(), parts[0].clone()], &output),
        &["shard 1"],
        kept,
    );
    let run = calibrate(&model, &output, &["--method", "vlmq-v1"]);
    fails(run, &["have no drift"], kept);
    let run = calibrate(&model, &output, &["--method", "awq"]);
    fails(run, &["solves from none"], kept);
    let run = calibrate(&model, &output, &["--shard", "40/40"]);
    fails(run, &["fewer batches of samples than shards"], kept);
    let all = home.path().join("all");
    good(merge(&parts, &all));
    fails(
        quantize_from(&model, &all, &output, &[]),
        &["tokens were weighed by"],
        3,
    );
    let other = model_copy(home.path());
    let weights = other.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    // A bit here and there, of every layer at least one.
    let start = bytes.len() / 4;
    bytes[start..]
        .iter_mut()
        .step_by(9_999)
        .for_each(|byte| *byte ^= 1);
    std::fs::write(&weights, bytes).unwrap();
    let run = quantize_from(&other, &all, &output, &gptq);
    fails(run, &["other weights of layer"], 4);
    let file = all.join("layer-00001.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 9]).unwrap();
    let run = quantize_from(&model, &all, &output, &gptq);
    fails(run, &["layer-00001.safetensors"], 4);
}
