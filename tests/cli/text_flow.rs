//! Text alone: as calibration, beside samples with images, and as a task.

use super::tiny::{Home, Spelling};
use super::{json, text, vlmq};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Output;

const LONG: &str = "The quick brown fox jumps over the lazy dog, and the dog does not wake up.";

/// A home whose folder of data has one more file.
fn home(name: &str, rows: &[Value]) -> (Home, PathBuf) {
    let home = Home::new(Spelling::USUAL);
    let path = home.data().join(name);
    let lines = rows.iter().map(|row| format!("{row}\n"));
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    (home, path)
}

fn quantize(home: &Home, data: &PathBuf, more: &[&str]) -> Output {
    let mut command = vlmq();
    command.arg("quantize").arg(home.model());
    command.arg("--output").arg(home.output());
    command.arg("--calibration").arg(data);
    command.args(["--group-size", "32", "--bits", "3", "--json"]);
    command.args(more).output().unwrap()
}

fn eval(home: &Home, task: &PathBuf, more: &[&str]) -> Output {
    let mut command = vlmq();
    command.arg("eval").arg(home.model());
    command.arg("--task").arg(task).args(more).output().unwrap()
}

fn chat(image: Option<&str>) -> Value {
    let place = if image.is_some() { "<image>\n" } else { "" };
    json!({"image": image, "conversations": [
        {"from": "human", "value": format!("{place}how many?")},
        {"from": "gpt", "value": "there are three of them"},
    ]})
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    json(&output.stdout)["report"].take()
}

/// Sum of weight shares of every module that is weighted, and whether each class has a part.
fn check_shares(report: &Value, classes: &[&str]) {
    let modules = report["modules"].as_array().unwrap();
    let shares: Vec<&Value> = modules
        .iter()
        .map(|m| &m["weight_share"])
        .filter(|share| !share.is_null())
        .collect();
    assert!(!shares.is_empty());
    for share in shares {
        let share = share.as_object().unwrap();
        let names: Vec<&str> = share.keys().map(String::as_str).collect();
        assert_eq!(names, classes);
        let sum: f64 = share.values().map(|v| v.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{share:?}");
    }
}

#[test]
fn raw_text_alone_calibrates_in_pieces() {
    let rows = [json!({"text": LONG}), json!({"text": "a"})];
    let (home, path) = home("corpus.jsonl", &rows);
    let more = ["--method", "vlmq", "--samples", "2", "--max-tokens", "8"];
    let report = report(&quantize(&home, &path, &more));
    let calibration = &report["calibration"];
    assert_eq!(calibration["n_samples"], 2);
    let classes = calibration["n_tokens"].as_object().unwrap();
    assert_eq!(classes.keys().collect::<Vec<_>>(), ["text"]);
    // Pieces after the first repeat a token.
    let (n, n_sequences) = (&classes["text"], &calibration["n_sequences"]);
    let (n, n_sequences) = (n.as_u64().unwrap(), n_sequences.as_u64().unwrap());
    assert!(n_sequences > 3);
    assert_eq!(n_sequences, 1 + (n - 1).div_ceil(8), "{calibration}");
    check_shares(&report, &["text"]);
}

#[test]
fn conversations_without_images_calibrate() {
    let (home, path) = home("chats.jsonl", &[chat(None), chat(None)]);
    let report = report(&quantize(&home, &path, &["--samples", "2"]));
    let classes = report["calibration"]["n_tokens"].as_object().unwrap();
    let names: Vec<&String> = classes.keys().collect();
    assert_eq!(names, ["answer", "prompt", "special"]);
    check_shares(&report, &["answer", "prompt", "special"]);
}

#[test]
fn samples_of_all_kinds_calibrate_together() {
    let rows = [chat(Some("1.png")), json!({"text": LONG}), chat(None)];
    let (home, path) = home("mixed.jsonl", &rows);
    let report = report(&quantize(&home, &path, &["--samples", "3"]));
    assert_eq!(report["calibration"]["n_sequences"], 3);
    check_shares(&report, &["answer", "prompt", "special", "text", "vision"]);
    let plan = home.path().join("plan");
    let dry = ["--samples", "3", "--dry-run", "--output"];
    let mut more = dry.to_vec();
    more.push(plan.to_str().unwrap());
    let mut command = vlmq();
    command.arg("quantize").arg(home.model()).args(&more);
    command.args(["--group-size", "32", "--json", "--calibration"]);
    let plan = json(&command.arg(&path).output().unwrap().stdout);
    let all = report["calibration"]["n_tokens"].as_object().unwrap();
    let n: u64 = all.values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(
        (&plan["n_tokens"], &plan["n_samples"]),
        (&json!(n), &json!(3))
    );
}

#[test]
fn text_that_cannot_be_is_named() {
    let cases = [
        (json!({"text": ""}), "text: it is empty"),
        (json!({"text": 5}), "a text expected"),
        (json!({"text": "x", "image": "1.png"}), "no place"),
        (json!({"text": "see <|image_pad|>"}), "image token"),
    ];
    for (row, expected) in cases {
        let (home, path) = home("corpus.jsonl", &[json!({"text": LONG}), row]);
        for output in [
            quantize(&home, &path, &["--samples", "2"]),
            eval(&home, &path, &[]),
        ] {
            let message = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{message}");
            let named = message.contains("corpus.jsonl") && message.contains("line 2");
            assert!(named && message.contains(expected), "{message}");
        }
    }
}

#[test]
fn perplexity_counts_every_token_but_the_first() {
    let rows = [
        json!({"id": "fox", "text": LONG}),
        json!({"text": "how many?"}),
    ];
    let (home, path) = home("held_out.jsonl", &rows);
    let model = home.model();
    let answers = home.path().join("answers");
    let more = ["--json", "--reference", model.to_str().unwrap(), "--output"];
    let mut more = more.to_vec();
    more.push(answers.to_str().unwrap());
    let output = eval(&home, &path, &more);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let task = json(&output.stdout)["tasks"]["held_out"].take();
    assert_eq!(task["n_texts"], 2);
    assert_eq!(task["kl_per_token"], 0.0);
    assert_eq!(task["same_top_percent"], 100.0);
    assert_eq!(task["perplexity"], task["reference_perplexity"]);
    // Random weights: about as many choices as there are tokens.
    assert!(task["perplexity"].as_f64().unwrap() > 50.0, "{task}");
    let rows = std::fs::read(answers.join("predictions.json")).unwrap();
    let rows = json(&rows)["held_out"].take();
    assert_eq!(rows[0]["id"], "fox");
    let n = |row: &Value| row["n_tokens"].as_u64().unwrap();
    assert_eq!(json!(n(&rows[0]) + n(&rows[1])), task["n_tokens"]);

    let short = eval(&home, &path, &["--json", "--max-tokens", "4"]);
    let pieces = json(&short.stdout)["tasks"]["held_out"].take();
    assert_eq!(pieces["n_tokens"], task["n_tokens"]);
    assert_ne!(pieces["perplexity"], task["perplexity"]);
    assert!(pieces["kl_per_token"].is_null());
    let table = text(&eval(&home, &path, &["--limit", "1"]).stdout);
    assert!(
        table.contains("perplexity") && !table.contains("exact"),
        "{table}"
    );
}

#[test]
fn a_task_is_of_one_kind_and_has_something_to_predict() {
    let one = [json!({"text": LONG}), json!({"text": "a"})];
    let mixed = [
        json!({"text": LONG}),
        json!({"question": "a?", "answer": "b"}),
    ];
    for (rows, expected) in [(one, "one token"), (mixed, "one kind")] {
        let (home, path) = home("held_out.jsonl", &rows);
        let message = text(&eval(&home, &path, &[]).stderr);
        let named = message.contains("held_out.jsonl") && message.contains("line 2");
        assert!(named && message.contains(expected), "{message}");
    }
}

#[test]
fn a_sweep_scores_questions_and_texts() {
    let (home, _) = home("texts.jsonl", &[json!({"text": LONG})]);
    let tasks = home.path().join("tasks");
    std::fs::create_dir(&tasks).unwrap();
    let question = json!({"question": "how many?", "answer": "3"});
    std::fs::write(tasks.join("asked.jsonl"), format!("{question}\n")).unwrap();
    std::fs::copy(home.data().join("texts.jsonl"), tasks.join("texts.jsonl")).unwrap();
    let toml = "model = 'model'\ncalibration = 'data/texts.jsonl'\ntasks = 'tasks'\n\
                samples = 1\nseeds = [0]\nmethods = ['rtn', 'gptq']\nmax_tokens = 16\n\
                bits = [2]\ngroup_sizes = [32]\n";
    let sweep = home.path().join("sweep.toml");
    std::fs::write(&sweep, toml).unwrap();
    let rows = home.path().join("rows.jsonl");
    let mut command = vlmq();
    command
        .arg("compare")
        .arg(&sweep)
        .arg("--output")
        .arg(&rows);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    assert!(
        table.contains("asked | texts (perplexity) | mean accuracy |"),
        "{table}"
    );
    for (i, line) in std::fs::read_to_string(&rows).unwrap().lines().enumerate() {
        let row = json(line.as_bytes());
        let (asked, texts) = (&row["tasks"]["asked"], &row["tasks"]["texts"]);
        assert!(asked["accuracy"].is_number() && asked["perplexity"].is_null());
        assert!(texts["perplexity"].is_number() && texts["accuracy"].is_null());
        assert_eq!(texts["kl"].as_f64().unwrap() > 0.0, i > 0, "{row}");
    }
}
