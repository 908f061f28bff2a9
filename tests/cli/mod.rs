mod allocation;
mod bad_input;
mod configuration;
mod damaged_parts;
mod evaluation;
mod exports;
mod flow;
mod offline;
mod padding;
mod ranks;
mod report;
mod resume;
mod room;
mod rotation;
mod scales;
mod small_flow;
mod terminal;
mod text_flow;
mod tiny;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn vlmq() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vlmq"))
}

/// Runs `vlmq quantize MODEL` with few samples and more arguments.
fn quantize(model: &Path, output: &Path, more: &[&str]) -> Output {
    let mut command = vlmq();
    command
        .arg("quantize")
        .arg(model)
        .arg("--output")
        .arg(output);
    if !more.contains(&"--calibration") {
        command
            .arg("--calibration")
            .arg(repository("testbed/calibration"));
    }
    if !more.contains(&"--samples") {
        command.args(["--samples", "4"]);
    }
    if !more.contains(&"--group-size") {
        command.args(["--group-size", "64"]);
    }
    command.args(more).output().unwrap()
}

/// What `vlmq eval FOLDER` says of the first three counting questions, beside the original.
fn eval_counting(folder: &Path, original: &Path) -> serde_json::Value {
    let eval = vlmq()
        .arg("eval")
        .arg(folder)
        .arg("--task")
        .arg(repository("testbed/eval/counting.parquet"))
        .args(["--limit", "3", "--json", "--reference"])
        .arg(original)
        .output()
        .unwrap();
    let folder = folder.display();
    assert!(eval.status.success(), "{folder}: {}", text(&eval.stderr));
    json(&eval.stdout)["tasks"]["counting"].take()
}

/// A copy of the bundled model that may be damaged.
fn model_copy(home: &Path) -> PathBuf {
    let copy = home.join("model");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(repository("testbed/model")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    copy
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", text(bytes)))
}
