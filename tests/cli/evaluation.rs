//! Benchmarks by name, and answers that were written down.

use super::{json, repository, text, vlmq};
use std::path::Path;
use std::process::Output;

const N: usize = 40;

/// Questions as ChartQA's.
fn write_questions(folder: &Path) {
    let image = repository("testbed/calibration/images.zip");
    std::fs::copy(image, folder.join("images.zip")).unwrap();
    let name = std::fs::read_to_string(repository("testbed/calibration/samples.jsonl")).unwrap();
    let first = json(name.lines().next().unwrap().as_bytes());
    let row = |i: usize| {
        let kind = ["human_test", "augmented_test"][i % 2];
        let row = serde_json::json!({"question_id": i, "image": first["image"], "type": kind,
            "question": format!("what is number {i}?"), "answer": "14"});
        format!("{row}\n")
    };
    let rows: String = (0..N).map(row).collect();
    std::fs::write(folder.join("questions.jsonl"), rows).unwrap();
}

fn eval(folder: &Path, task: &str, more: &[&str]) -> Output {
    vlmq()
        .arg("eval")
        .arg(repository("testbed/model"))
        .arg("--task")
        .arg(format!(
            "{task}{}",
            folder.join("questions.jsonl").display()
        ))
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn a_stopped_run_goes_on_with_the_same_numbers() {
    let home = tempfile::tempdir().unwrap();
    write_questions(home.path());
    let output = home.path().join("answers");
    let flags = ["--json", "--output", output.to_str().unwrap()];
    let whole = eval(home.path(), "chartqa=", &flags);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    let samples = output.join("samples_chartqa.jsonl");
    let lines = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(lines.lines().count(), N);
    let groups = &json(&whole.stdout)["tasks"]["chartqa"]["groups"];
    assert_eq!(groups["relaxed_human_split"]["n"], N / 2);

    // As if killed in the middle of the line after twenty.
    let cut: usize = lines.split_inclusive('\n').take(20).map(str::len).sum();
    std::fs::write(&samples, &lines[..cut + 9]).unwrap();
    std::fs::remove_file(output.join("predictions.json")).unwrap();
    let other = eval(
        home.path(),
        "chartqa=",
        &[&flags[..], &["--limit", "3"]].concat(),
    );
    assert!(
        text(&other.stderr).contains("another limit"),
        "{}",
        text(&other.stderr)
    );
    let again = eval(home.path(), "chartqa=", &flags);
    assert_eq!(text(&again.stdout), text(&whole.stdout));
    assert_eq!(std::fs::read_to_string(&samples).unwrap(), lines);
    let finished = eval(home.path(), "chartqa=", &flags);
    assert!(text(&finished.stderr).contains("exists already"));
}

#[test]
fn benchmarks_have_names_and_columns() {
    let home = tempfile::tempdir().unwrap();
    write_questions(home.path());
    for (task, expected) in [
        ("chartqb=", "one of chartqa, docvqa"),
        ("mme-realworld=", "missing column multi-choice options in"),
        ("scienceqa=", "missing column choices"),
    ] {
        let run = eval(home.path(), task, &[]);
        assert_eq!(run.status.code(), Some(2));
        assert!(
            text(&run.stderr).contains(expected),
            "{}",
            text(&run.stderr)
        );
    }
}

#[test]
fn written_answers_are_scored_and_compared() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, predictions: &[&str]| {
        let row = |(i, p): (usize, &&str)| {
            format!("{{\"id\": {i}, \"answers\": [\"14\"], \"prediction\": \"{p}\"}}\n")
        };
        let path = home.path().join(name);
        std::fs::write(
            &path,
            predictions.iter().enumerate().map(row).collect::<String>(),
        )
        .unwrap();
        path
    };
    let own = write("own.jsonl", &["14", "14.5", "x", "14"]);
    let other = write("other.jsonl", &["14", "x", "14.", "y"]);
    let score = |more: &[&str]| {
        let mut command = vlmq();
        command.arg("score").arg(&own).arg("--against").arg(&other);
        command
            .args(["--benchmark", "docvqa"])
            .args(more)
            .output()
            .unwrap()
    };
    let run = score(&["--json"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let found = json(&run.stdout);
    // ANLS: two letters too many of four are a half, which counts.
    assert_eq!(found["scores"], serde_json::json!([1.0, 0.5, 0.0, 1.0]));
    let pairs = &found["pairs"];
    assert_eq!(
        (&pairs["n_only_first"], &pairs["n_only_second"]),
        (&2.into(), &1.into())
    );
    assert_eq!(pairs["p_value"], 1.0);
    assert_eq!(found["flipped"].as_array().unwrap().len(), 3);
    assert!(text(&score(&[]).stdout).contains("McNemar p = 1.0000"));
    write("other.jsonl", &["14"]);
    let run = score(&[]);
    assert!(
        text(&run.stderr).contains("the same questions"),
        "{}",
        text(&run.stderr)
    );
}
