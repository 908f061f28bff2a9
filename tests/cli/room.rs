//! What hidden states may take, which changes nothing of what comes out.

use super::bad_input::assert_clear_failure;
use super::resume::{assert_same, files};
use super::{json, model_copy, quantize, repository, text};
use serde_json::Value;
use std::path::Path;

/// Two shards, batches of several samples, both halves of each; the default has both streams, drift and a part.
fn run(output: &Path, more: &[&str]) -> Value {
    let model = repository("testbed/model");
    let all = ["--samples", "24", "--bits", "3", "--shards", "2", "--json"];
    let done = quantize(&model, output, &[&all, more].concat());
    assert!(done.status.success(), "{}", text(&done.stderr));
    json(&done.stdout)["report"].take()
}

#[test]
fn inputs_made_again_are_those_that_were_kept() {
    let home = tempfile::tempdir().unwrap();
    for method in ["vlmq", "gptq"] {
        let of = |name: &str| home.path().join(format!("{method}-{name}"));
        let (kept, again, on_disk) = (of("kept"), of("again"), of("disk"));
        let report = run(&kept, &["--method", method]);
        assert_eq!(report["engine"]["remakes_inputs"], false);
        let expected = files(&kept);
        let report = run(&again, &["--method", method, "--remake-inputs"]);
        assert_eq!(report["engine"]["remakes_inputs"], true);
        assert_same(&again, &expected, "made again");
        run(
            &on_disk,
            &["--method", method, "--memory", "1MB", "--remake-inputs"],
        );
        assert_same(&on_disk, &expected, "made again of what lies on disk");
    }
}

#[test]
fn a_plan_tells_what_making_inputs_again_saves() {
    let home = tempfile::tempdir().unwrap();
    let plan = |more: &[&str]| {
        let all = ["--samples", "24", "--dry-run", "--json"];
        let model = repository("testbed/model");
        let done = quantize(&model, &home.path().join("out"), &[&all, more].concat());
        assert!(done.status.success(), "{}", text(&done.stderr));
        let plan = json(&done.stdout);
        let of = |name: &str| plan["memory"][name].as_u64().unwrap();
        (of("streams"), of("wide"))
    };
    let (kept, again) = (plan(&[]), plan(&["--remake-inputs"]));
    // Widths of 256 and 768, heads of 32: 3 states of 256, 2 of 768 or 256, 2 rotary tables.
    assert_eq!(again.0 * (3 * 256 + 2 * 768 + 64), kept.0 * (5 * 256 + 64));
    assert!(again.1 > kept.1);
}

#[test]
fn inputs_that_must_be_kept_are_told_before_any_work() {
    let home = tempfile::tempdir().unwrap();
    let model = model_copy(home.path());
    let output = home.path().join("out");
    let run = quantize(&model, &output, &["--method", "awq", "--remake-inputs"]);
    assert_clear_failure(&run, &["--remake-inputs", "awq"], home.path(), 1);
}
