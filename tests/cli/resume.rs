//! Runs that are ended in the middle, however it happens, and go on: the same bytes in the end.

use super::bad_input::assert_clear_failure;
use super::tiny::{Home, Spelling};
use super::{json, quantize, repository, text, vlmq};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Every file of a folder but the report, which tells times, and the card, which tells its name.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
        .filter(|(name, _)| name != "vlmq_report.json" && name != "README.md")
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect()
}

pub fn assert_same(folder: &Path, expected: &BTreeMap<String, Vec<u8>>, when: &str) {
    let found = files(folder);
    let names = |files: &BTreeMap<_, _>| files.keys().cloned().collect::<Vec<String>>();
    assert_eq!(names(&found), names(expected), "{when}");
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{name} differs, {when}");
    }
}

fn progress_of(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap().to_string_lossy();
    output.with_file_name(format!(".{name}.progress"))
}

fn report(run: &Output) -> Value {
    assert!(run.status.success(), "{}", text(&run.stderr));
    json(&run.stdout)["report"].take()
}

/// `vlmq quantize` of the bundled model, its words on stderr to be read.
fn begin(model: &Path, output: &Path, samples: &str) -> Child {
    vlmq()
        .arg("quantize")
        .arg(model)
        .arg("--calibration")
        .arg(repository("testbed/calibration"))
        .args([
            "--samples",
            samples,
            "--bits",
            "3",
            "--group-size",
            "64",
            "--output",
        ])
        .arg(output)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until the run is at `layer` of the bundled model.
fn wait_for(child: &mut Child, layer: usize) -> impl Iterator<Item = String> + use<> {
    let mut lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let expected = format!("layer {layer} of 4");
    assert!(lines.by_ref().any(|line| line == expected), "{expected}");
    lines
}

/// Whether a finished layer waits in the progress folder.
fn has_finished_layer(output: &Path) -> bool {
    let entries = std::fs::read_dir(progress_of(output));
    let mut names = entries.into_iter().flatten().flatten();
    names.any(|entry| entry.file_name().to_string_lossy().starts_with("layer-"))
}

/// When a run is killed.
enum Moment {
    After(Duration),
    /// As soon as its first layer is finished.
    FirstLayer,
}

impl Moment {
    /// Every third one once a layer is finished: where the layers are a small part of a run, few of
    /// the others would find one.
    fn draw(n_killed: usize, span: Duration, rng: &mut ChaCha8Rng) -> Self {
        let share = rng.random_range(0.0..1.05);
        match n_killed % 3 {
            2 => Self::FirstLayer,
            _ => Self::After(span.mul_f64(share)),
        }
    }

    fn has_come(&self, began: Instant, output: &Path) -> bool {
        match self {
            Self::After(patience) => began.elapsed() >= *patience,
            Self::FirstLayer => has_finished_layer(output),
        }
    }
}

/// Kills runs at random moments, some of them twice before they may end, until `n_kills` are dead
/// and a run has gone on with the layers of another; what the last run of each writes is compared
/// with a run that nobody disturbed.
fn kill(n_kills: usize, output: &Path, run: impl Fn(&Path) -> Command) {
    let whole = output.with_file_name("whole");
    let began = Instant::now();
    assert!(run(&whole).output().unwrap().status.success());
    let mut span = began.elapsed();
    let expected = files(&whole);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (mut killed, mut resumed) = (0, 0);
    for round in 0.. {
        if killed >= n_kills && resumed > 0 {
            return;
        }
        assert!(
            round < 4 * n_kills,
            "{killed} of {n_kills} runs were killed, {resumed} found a finished layer"
        );
        for _ in 0..rng.random_range(1..=2) {
            let mut child = run(output)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let (began, moment) = (Instant::now(), Moment::draw(killed, span, &mut rng));
            let has_ended = loop {
                match (child.try_wait().unwrap(), moment.has_come(began, output)) {
                    (Some(_), _) => break true,
                    (None, false) => std::thread::sleep(Duration::from_millis(1)),
                    (None, true) => break false,
                }
            };
            match has_ended {
                false => killed += 1,
                // The first run may have been a slow one.
                true => span = began.elapsed(),
            }
            child.kill().unwrap();
            child.wait().unwrap();
            if output.exists() {
                break;
            }
        }
        let when = format!("after {killed} kills");
        if !output.exists() {
            let report = report(&run(output).output().unwrap());
            resumed += usize::from(report["n_resumed_layers"].as_u64().unwrap() > 0);
            assert!(!progress_of(output).exists(), "{when}");
        }
        assert_same(output, &expected, &when);
        std::fs::remove_dir_all(output).unwrap();
        let _ = std::fs::remove_dir_all(progress_of(output));
    }
}

/// Runs of a small model with these flags, killed again and again.
fn kill_small(n_kills: usize, flags: &[&str]) {
    let home = Home::new(Spelling::USUAL);
    kill(n_kills, &home.output(), |output| {
        let mut command = vlmq();
        command.arg("quantize").arg(home.model());
        command.arg("--calibration").arg(home.data()).args(flags);
        command.args(["--group-size", "32", "--samples", "6", "--json"]);
        command.arg("--output").arg(output);
        command
    });
}

#[test]
fn a_run_killed_at_a_hundred_moments_writes_the_same_bytes() {
    kill_small(100, &["--bits", "3"]);
}

/// The layers that are left get the bits that they would have had.
#[test]
fn a_killed_run_with_shared_bits_writes_the_same_bytes() {
    kill_small(40, &["--bits", "2.6"]);
}

/// The squares of inputs come back with their layers.
#[test]
fn a_killed_run_with_an_importance_matrix_writes_the_same_bytes() {
    let home = Home::new(Spelling::USUAL);
    kill(10, &home.output(), |output| {
        let mut command = vlmq();
        command.arg("quantize").arg(home.model());
        command.arg("--calibration").arg(home.data());
        command.args(["--bits", "3", "--imatrix"]);
        command.args(["--group-size", "32", "--samples", "6", "--json"]);
        command.arg("--output").arg(output);
        command
    });
    // The runs left nothing; the whole one has the file that all of them were held against.
    assert!(
        home.output()
            .with_file_name("whole")
            .join("imatrix.gguf")
            .exists()
    );
}

/// Norms that were changed come back with their layers.
#[test]
fn a_killed_awq_run_writes_the_same_bytes() {
    kill_small(60, &["--method", "awq", "--bits", "3"]);
}

#[test]
fn the_bundled_model_too() {
    let home = tempfile::tempdir().unwrap();
    kill(10, &home.path().join("out"), |output| {
        let mut command = vlmq();
        command.arg("quantize").arg(repository("testbed/model"));
        command
            .arg("--calibration")
            .arg(repository("testbed/calibration"));
        command.args([
            "--bits",
            "2",
            "--group-size",
            "64",
            "--samples",
            "4",
            "--json",
        ]);
        command.arg("--output").arg(output);
        command
    });
}

/// After Ctrl-C in the third layer: two are kept, the same command goes on, another one does not.
#[test]
#[cfg(unix)]
fn an_interrupted_run_is_gone_on_with_by_its_like_alone() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (repository("testbed/model"), home.path().join("out"));
    let mut child = begin(&model, &output, "8");
    let rest = wait_for(&mut child, 3);
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let words = rest.collect::<Vec<String>>().join("\n");
    assert_eq!(child.wait().unwrap().code(), Some(2), "{words}");
    assert!(words.contains("2 finished layers are kept in"), "{words}");

    let more = |flags: &[&str]| {
        let usual = ["--samples", "8", "--json"];
        quantize(&model, &output, &[&usual, flags].concat())
    };
    let plan = json(&more(&["--bits", "3", "--dry-run"]).stdout)["progress_bytes"].as_f64();
    let sizes = files(&progress_of(&output));
    let sizes = sizes.iter().filter(|(name, _)| name.starts_with("layer-"));
    let written: usize = sizes.map(|(_, bytes)| bytes.len()).sum();
    // Each layer's record is not planned.
    let ratio = 2.0 * written as f64 / plan.unwrap();
    assert!((1.0..1.1).contains(&ratio), "{ratio} of the plan");
    let other = more(&["--bits", "4"]);
    assert_clear_failure(
        &other,
        &[".out.progress", "settings"],
        &progress_of(&output),
        4,
    );
    let other = more(&["--bits", "2.5"]);
    assert_clear_failure(
        &other,
        &[".out.progress", "settings"],
        &progress_of(&output),
        4,
    );
    let other = quantize(&model, &output, &["--samples", "9", "--bits", "3"]);
    assert_clear_failure(
        &other,
        &[".out.progress", "samples"],
        &progress_of(&output),
        4,
    );
    let same = report(&more(&["--bits", "3", "--resume", "required"]));
    assert_eq!(same["n_resumed_layers"], 2);
    assert_eq!(same["layers"].as_array().unwrap().len(), 4);
    assert_eq!(same["modules"].as_array().unwrap().len(), 28);
    let resumed = files(&output);
    std::fs::remove_dir_all(&output).unwrap();
    let none = more(&["--bits", "3", "--resume", "required"]);
    assert_clear_failure(&none, &["finished layer", ".out.progress"], home.path(), 0);
    assert_eq!(report(&more(&["--bits", "3"]))["n_resumed_layers"], 0);
    assert_same(&output, &resumed, "without a stop");
}

/// A run that was killed in its third layer.
fn half_done(home: &Path) -> (PathBuf, PathBuf) {
    let (model, output) = (super::model_copy(home), home.join("out"));
    let mut child = begin(&model, &output, "4");
    let _words = wait_for(&mut child, 3);
    child.kill().unwrap();
    child.wait().unwrap();
    (model, output)
}

#[test]
fn a_damaged_layer_is_told_and_only_that_one_is_lost() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = half_done(home.path());
    let path = progress_of(&output).join("layer-00000.vlmq");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let run = quantize(&model, &output, &["--bits", "3"]);
    assert_clear_failure(&run, &["layer-00000.vlmq", "checksum"], home.path(), 1);
    std::fs::remove_file(&path).unwrap();
    let again = report(&quantize(&model, &output, &["--bits", "3", "--json"]));
    assert_eq!(again["n_resumed_layers"], 1);
    let whole = home.path().join("whole");
    report(&quantize(&model, &whole, &["--bits", "3", "--json"]));
    assert_same(&output, &files(&whole), "after the repair");
}

#[test]
fn layers_of_other_weights_are_not_taken() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = half_done(home.path());
    super::bad_input::poke(&model, "model.layers.1.mlp.up_proj.weight", 0x3f80);
    let run = quantize(&model, &output, &["--bits", "3"]);
    let expected = [".out.progress", "weights of layer 1"];
    assert_clear_failure(&run, &expected, &progress_of(&output), 4);
    let fresh = quantize(
        &model,
        &output,
        &["--bits", "3", "--json", "--resume", "never"],
    );
    assert_eq!(report(&fresh)["n_resumed_layers"], 0);
}

#[test]
fn a_source_that_changes_under_a_run_ends_it() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (super::model_copy(home.path()), home.path().join("out"));
    let mut child = begin(&model, &output, "64");
    let rest = wait_for(&mut child, 2);
    super::bad_input::poke(&model, "model.layers.3.mlp.up_proj.weight", 0x3f80);
    let words = rest.collect::<Vec<String>>().join("\n");
    assert_eq!(child.wait().unwrap().code(), Some(2), "{words}");
    assert!(words.contains("model.safetensors"), "{words}");
    assert!(words.contains("written to"), "{words}");
    assert!(!output.exists());
}

#[test]
fn two_runs_for_one_output_do_not_meet() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (repository("testbed/model"), home.path().join("out"));
    let mut child = begin(&model, &output, "64");
    let _words = wait_for(&mut child, 1);
    let second = quantize(&model, &output, &["--bits", "3"]);
    let expected = [".out.progress", "another process"];
    assert_clear_failure(&second, &expected, &progress_of(&output), 3);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// On file systems too small for the layers, for the output, and for neither.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_loses_no_finished_layer() {
    let can_mount = "mount -t tmpfs -o size=1m none /mnt";
    let unshare = |script: &str, disk: &Path| {
        let mut command = Command::new("unshare");
        command.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
        ]);
        command.arg(disk).arg(env!("CARGO_BIN_EXE_vlmq")).output()
    };
    let home = tempfile::tempdir().unwrap();
    if !unshare(can_mount, home.path()).is_ok_and(|run| run.status.success()) {
        eprintln!("not tested: this user may not mount a small file system");
        return;
    }
    let (disk, kept) = (home.path().join("disk"), home.path().join("kept"));
    std::fs::create_dir(&disk).unwrap();
    let model = repository("testbed/model");
    let whole = home.path().join("whole");
    let flags = ["--bits", "3", "--json"];
    report(&quantize(&model, &whole, &flags));
    for (kilobytes, n_kept) in [(100, 0..1), (1200, 1..4), (4000, 4..5)] {
        let script = format!(
            "set -e; mount -t tmpfs -o size={kilobytes}k none $1
             run() {{ $2 quantize {model} --calibration {data} --samples 4 --group-size 64 \
                     --bits 3 --json --output $1/out; }}
             run $1 $2 && exit 3
             test ! -e $1/out; ls -a $1/.out.progress 2>/dev/null | grep -c '^layer-.*vlmq$' >&2 || true
             mount -o remount,size=64m $1
             run $1 $2; test ! -e $1/.out.progress; cp -r $1/out {kept}",
            model = model.display(),
            data = repository("testbed/calibration").display(),
            kept = kept.display(),
        );
        let run = unshare(&script, &disk).unwrap();
        let words = text(&run.stderr);
        assert!(words.contains("No space left on device"), "{words}");
        let report = report(&run);
        let n_resumed = report["n_resumed_layers"].as_u64().unwrap();
        assert!(
            n_kept.contains(&n_resumed),
            "{kilobytes} kB: {n_resumed} layers kept: {words}"
        );
        assert_same(&kept, &files(&whole), &format!("with {kilobytes} kB"));
        std::fs::remove_dir_all(&kept).unwrap();
    }
}

/// The weights that the pictures are of lie in the finished layers: a run that is killed writes the
/// same as one that is not.
#[test]
fn a_killed_run_with_a_report_keeps_its_pictures() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (repository("testbed/model"), home.path().join("out"));
    let run = |flags: &[&str]| {
        let usual = ["--report", "--bits", "3", "--samples", "4", "--json"];
        quantize(&model, &output, &[&usual, flags].concat())
    };
    report(&run(&[]));
    let file = output.join("vlmq_importance.json");
    let whole = std::fs::read(&file).unwrap();
    std::fs::remove_dir_all(&output).unwrap();
    let mut child = vlmq()
        .arg("quantize")
        .arg(&model)
        .arg("--calibration")
        .arg(repository("testbed/calibration"))
        .args([
            "--report",
            "--bits",
            "3",
            "--samples",
            "4",
            "--group-size",
            "64",
            "--output",
        ])
        .arg(&output)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let _words = wait_for(&mut child, 4);
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = report(&run(&["--resume", "required"]));
    assert!(resumed["n_resumed_layers"].as_u64().unwrap() >= 3);
    assert!(
        std::fs::read(&file).unwrap() == whole,
        "the pictures differ"
    );
    let layers = resumed["modules"].as_array().unwrap().iter();
    assert!(layers.into_iter().all(|m| m["nearest_loss"].is_f64()));
}

/// Layers of a run that was to have no report lack its pictures, and the page says so.
#[test]
fn a_report_that_comes_late_says_what_it_lacks() {
    let home = tempfile::tempdir().unwrap();
    let (model, output) = (repository("testbed/model"), home.path().join("out"));
    let mut child = begin(&model, &output, "4");
    let _words = wait_for(&mut child, 4);
    child.kill().unwrap();
    child.wait().unwrap();
    let more = [
        "--report",
        "--bits",
        "3",
        "--samples",
        "4",
        "--resume",
        "required",
        "--json",
    ];
    report(&quantize(&model, &output, &more));
    let page = std::fs::read_to_string(output.join("report.html")).unwrap();
    assert!(page.contains("an earlier run without --report finished this layer"));
}
