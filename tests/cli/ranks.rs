//! Several ranks at one run: the same bytes however many there are, and one clear end when one fails.

use super::bad_input::assert_clear_failure;
use super::resume::{assert_same, files};
use super::tiny::{Home, Spelling};
use super::{json, quantize, repository, text, vlmq};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use vlmq::checkpoint::Checkpoint;
use vlmq::dataset::open_samples;
use vlmq::distributed::{Communicator, Local};
use vlmq::export::Format;
use vlmq::families::open_model;
use vlmq::journal::Resume;
use vlmq::pipeline::Unobserved;
use vlmq::plan::{Bits, ScaleDtype, Scheme};
use vlmq::processor::MAX_TEXT_TOKENS;
use vlmq::recipe::{Method, Recipe};
use vlmq::run::{Room, RunOptions, SampleChoice, quantize_folder_among};
use vlmq::{Error, Result};

/// Long enough for a rank that is lost to be noticed, far shorter than the run.
const SECONDS: Duration = Duration::from_secs(20);

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn options(n_shards: Option<usize>, report: bool) -> RunOptions {
    RunOptions {
        format: Format::CompressedTensors,
        resume: Resume::Auto,
        n_shards,
        room: Room::of_memory(u64::MAX),
        imatrix: false,
        report,
        command: None,
    }
}

/// A model by one rank, with samples of more batches than there are shards.
fn by_rank(
    rank: &dyn Communicator,
    model: &Path,
    recipe: &Recipe,
    output: &Path,
    options: RunOptions,
) -> Result<u64> {
    let checkpoint = Checkpoint::open(model)?;
    let model = open_model(checkpoint, candle_core::Device::Cpu)?;
    let choice = SampleChoice {
        set: open_samples(&repository("testbed/calibration"))?,
        n_samples: 80,
        seed: 0,
        max_tokens: MAX_TEXT_TOKENS,
    };
    let (choice, observer) = (Some(&choice), &Unobserved);
    quantize_folder_among(rank, &model, recipe, choice, output, options, observer)?;
    Ok(rank.traffic().bytes_sent)
}

/// By so many ranks, each a thread; what each sent.
fn by_ranks(
    n_ranks: usize,
    model: &Path,
    recipe: &Recipe,
    output: &Path,
    options: &RunOptions,
) -> Vec<u64> {
    std::thread::scope(|scope| {
        let ranks = Local::ranks(n_ranks).into_iter().map(|rank| {
            let work = move || by_rank(&rank, model, recipe, output, options.clone()).unwrap();
            scope.spawn(work)
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

fn recipe(method: Method, bits: u8) -> Recipe {
    let scheme = Scheme::new(bits, Some(32), false, ScaleDtype::Bf16).unwrap();
    Recipe::new(method, scheme)
}

/// The law that all else rests on, for every way that statistics and factors are made. The bundled
/// model's linears are shared out by rows, those of the other are not.
#[test]
fn codes_depend_on_shards_and_not_on_ranks() {
    let home = Home::new(Spelling::USUAL);
    let mut mean = recipe(Method::Vlmq, 3).with_bits(Bits::Mean(2.5));
    mean.set("allocation_samples=40").unwrap();
    let mut fisher = recipe(Method::VlmqV2, 3);
    fisher.set("importance_loss=answer").unwrap();
    let (tiny, bundled) = (home.model(), repository("testbed/model"));
    let recipes = [
        ("bundled", &bundled, recipe(Method::Vlmq, 2), vec![3]),
        ("vlmq", &tiny, recipe(Method::Vlmq, 2), vec![2, 4, 6]),
        ("gptaq", &tiny, recipe(Method::Gptaq, 3), vec![3]),
        ("fisher", &tiny, fisher, vec![3]),
        ("mean", &tiny, mean, vec![3]),
        ("mbq", &tiny, recipe(Method::Mbq, 3), vec![3]),
        ("awq", &tiny, recipe(Method::Awq, 4), vec![2, 4]),
    ];
    let outputs = tempfile::tempdir().unwrap();
    for (name, model, recipe, more) in recipes {
        let options = options(Some(4), name == "vlmq");
        let one = outputs.path().join(format!("{name}-1"));
        assert_eq!(by_ranks(1, model, &recipe, &one, &options), [0]);
        let expected = without_page(files(&one));
        for n_ranks in more {
            let output = outputs.path().join(format!("{name}-{n_ranks}"));
            let sent = by_ranks(n_ranks, model, &recipe, &output, &options);
            assert!(sent.iter().all(|bytes| *bytes > 0));
            let found = without_page(files(&output));
            for (file, bytes) in &expected {
                assert!(found[file] == *bytes, "{file} of {name} by {n_ranks} ranks");
            }
            assert_eq!(found.len(), expected.len());
        }
    }
}

/// The page tells its folder's name.
fn without_page(mut files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    files.remove("report.html");
    files
}

/// `vlmq quantize` of the bundled model as one of several ranks.
fn rank_of(rank: usize, n_ranks: usize, port: u16, output: &Path, more: &[&str]) -> Child {
    let mut command = vlmq();
    command
        .arg("quantize")
        .arg(repository("testbed/model"))
        .arg("--calibration")
        .arg(repository("testbed/calibration"))
        .args(["--bits", "3", "--group-size", "64", "--threads", "1"])
        .args(more)
        .arg("--output")
        .arg(output);
    with_rank(&mut command, rank, n_ranks, port)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn with_rank(command: &mut Command, rank: usize, n_ranks: usize, port: u16) -> &mut Command {
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", n_ranks.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
}

fn finished(ranks: Vec<Child>) -> Vec<Output> {
    let outputs = ranks.into_iter().map(|rank| rank.wait_with_output());
    outputs.map(|output| output.unwrap()).collect()
}

/// Waits until rank 0 is at `layer`, and reads on in the background.
fn wait_for(rank: &mut Child, layer: usize) -> std::thread::JoinHandle<String> {
    let mut lines = BufReader::new(rank.stderr.take().unwrap());
    let expected = format!("layer {layer} of 4\n");
    let mut line = String::new();
    while line != expected {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "no {expected}");
    }
    std::thread::spawn(move || {
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        rest
    })
}

#[test]
fn processes_started_one_by_one_are_one_run() {
    let home = tempfile::tempdir().unwrap();
    let few = ["--samples", "64", "--json"];
    let alone = home.path().join("alone");
    let shards = [&few[..], &["--shards", "3", "--bits", "3"]].concat();
    let one = quantize(&repository("testbed/model"), &alone, &shards);
    assert!(one.status.success(), "{}", text(&one.stderr));
    let together = home.path().join("together");
    let port = free_port();
    let ranks = (0..3).map(|rank| rank_of(rank, 3, port, &together, &few));
    let outputs = finished(ranks.collect());
    for output in &outputs {
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert_same(&together, &files(&alone), "by three ranks");
    let told = json(&outputs[0].stdout)["report"].take();
    assert_eq!(told["ranks"]["n_ranks"], 3);
    assert_eq!(told["ranks"]["n_shards"], 3);
    let bytes = told["ranks"]["bytes_exchanged"].as_array().unwrap();
    assert!(bytes.len() == 4 && bytes.iter().all(|b| b.as_u64() > Some(0)));
    let one = json(&one.stdout)["report"].take();
    assert_eq!(told["calibration"], one["calibration"]);
    for other in &outputs[1..] {
        assert!(
            other.stdout.is_empty() && other.stderr.is_empty(),
            "only rank 0 tells"
        );
    }
}

/// kill -9 of a rank: all end within seconds with one message, nothing is left that looks done, and
/// any number of ranks goes on, to the same bytes.
#[test]
fn a_lost_rank_ends_the_run_and_any_number_of_ranks_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let few = ["--samples", "64"];
    let reference = home.path().join("reference");
    let shards = [&few[..], &["--shards", "3", "--bits", "3"]].concat();
    let one = quantize(&repository("testbed/model"), &reference, &shards);
    assert!(one.status.success(), "{}", text(&one.stderr));
    for (lost, n_after) in [(2, 1), (1, 2), (0, 4)] {
        let output = home.path().join(format!("lost-{lost}"));
        let port = free_port();
        let ranks = (0..3).map(|rank| rank_of(rank, 3, port, &output, &few));
        let mut ranks: Vec<Child> = ranks.collect();
        let first_says = wait_for(&mut ranks[0], 2);
        ranks[lost].kill().unwrap();
        let began = Instant::now();
        let outputs = finished(ranks);
        assert!(began.elapsed() < SECONDS, "{:?}", began.elapsed());
        let mut said: Vec<String> = outputs.iter().map(|o| text(&o.stderr)).collect();
        said[0] = first_says.join().unwrap();
        let all = said.concat();
        assert_eq!(all.matches("error: ").count(), 1, "{all}");
        assert!(all.contains(&format!("rank {lost} is lost")), "{all}");
        assert!(all.contains("hint: start all ranks again"), "{all}");
        let survivors = outputs.iter().enumerate().filter(|(rank, _)| *rank != lost);
        for (_, survivor) in survivors {
            assert_eq!(survivor.status.code(), Some(2));
        }
        assert!(!output.exists());
        let port = free_port();
        let more = [&few[..], &["--resume", "required"]].concat();
        let ranks = (0..n_after).map(|rank| rank_of(rank, n_after, port, &output, &more));
        for rank in finished(ranks.collect()) {
            assert!(rank.status.success(), "{}", text(&rank.stderr));
        }
        assert_same(&output, &files(&reference), "after the loss of a rank");
    }
}

#[test]
fn an_error_of_one_rank_is_told_once() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let port = free_port();
    let few: &[&str] = &["--samples", "6"];
    let ranks = [few, few, &["--samples", "5"]].into_iter().enumerate();
    let ranks = ranks.map(|(rank, more)| rank_of(rank, 3, port, &output, more));
    let outputs = finished(ranks.collect());
    let all: String = outputs.iter().map(|o| text(&o.stderr)).collect();
    assert_eq!(all.matches("error: ").count(), 1, "{all}");
    assert!(
        all.contains("rank 2: it was started with another samples"),
        "{all}"
    );
    assert!(outputs.iter().all(|o| o.status.code() == Some(2)));
    assert!(!output.exists());
}

#[test]
fn what_ranks_cannot_do_is_refused_before_any_work() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let model = repository("testbed/model");
    let mut tuned = recipe(Method::Vlmq, 2);
    tuned.set("tune_steps=10").unwrap();
    let errors = std::thread::scope(|scope| {
        let ranks = Local::ranks(2).into_iter().map(|rank| {
            let (tuned, output) = (&tuned, &output);
            let model = &model;
            let work = move || by_rank(&rank, model, tuned, output, options(None, false));
            scope.spawn(move || work().unwrap_err())
        });
        let ranks: Vec<_> = ranks.collect();
        let errors = ranks.into_iter().map(|rank| rank.join().unwrap());
        errors.collect::<Vec<Error>>()
    });
    assert!(
        errors
            .iter()
            .all(|e| matches!(e, Error::Unsupported { .. }))
    );
    // A number of ranks that is none.
    let mut wrong = vlmq();
    wrong.arg("quantize").arg(&model);
    wrong.args(["--method", "rtn", "--output"]).arg(&output);
    let wrong = with_rank(&mut wrong, 0, 2, 1)
        .env("WORLD_SIZE", "many")
        .output()
        .unwrap();
    let expected = ["WORLD_SIZE", "a number expected"];
    assert_clear_failure(&wrong, &expected, home.path(), 0);
}
