use super::*;
use crate::pipeline::LayerOutcome;
use crate::plan::{ScaleDtype, Scheme};
use crate::{Matrix, QuantizedWeight};
use proptest::prelude::*;
use tempfile::TempDir;

fn weight(bits: u8, symmetric: bool, seed: usize) -> QuantizedWeight {
    let scheme = Scheme::new(bits, Some(8), symmetric, ScaleDtype::Bf16).unwrap();
    let codes = (0..5 * 24).map(|i| ((i * 7 + seed) % (1 << bits)) as u8);
    let zero = |i: usize| match symmetric {
        true => 1 << (bits - 1),
        false => ((i + seed) % (1 << bits)) as u8,
    };
    let scales = Matrix::from_fn(5, 3, |row, group| (1 + row + group) as f32 / 64.0);
    let zeros = (0..15).map(zero).collect();
    QuantizedWeight::new("m", scheme, [5, 24], codes.collect(), scales, zeros).unwrap()
}

fn fingerprint() -> Fingerprint {
    Fingerprint {
        vlmq: "1".into(),
        settings: "s".into(),
        samples: "x".into(),
        n_shards: 1,
    }
}

fn finish(journal: &Journal, layer_idx: usize, weights: &[(&str, QuantizedWeight)]) {
    let mut writer = LayerWriter::create(journal.layer_path(layer_idx)).unwrap();
    for (name, weight) in weights {
        writer.module(name, weight).unwrap();
    }
    writer.tensor("norm", &[1.5, layer_idx as f32]);
    writer.tensor("bias", &[]);
    let mut outcome = LayerOutcome::default();
    outcome.seconds.insert("solve".into(), 1.5);
    writer.finish(layer_idx, "source", &outcome).unwrap();
}

/// A journal with two finished layers, given up.
fn earlier_run() -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    journal.bind(&fingerprint()).unwrap();
    finish(
        &journal,
        0,
        &[("a", weight(3, false, 1)), ("b", weight(4, true, 2))],
    );
    finish(&journal, 1, &[("c", weight(2, false, 3))]);
    (home, output)
}

fn source() -> Result<String> {
    Ok("source".into())
}

#[test]
fn layers_read_back_as_they_were() {
    let (_home, output) = earlier_run();
    let journal = Journal::open(&output, Resume::Required).unwrap();
    journal.bind(&fingerprint()).unwrap();
    assert_eq!(journal.n_finished().unwrap(), 2);
    let first = journal.finished(0, source).unwrap().unwrap();
    let expected = [
        ("a".to_owned(), weight(3, false, 1)),
        ("b".to_owned(), weight(4, true, 2)),
    ];
    assert_eq!(first.weights, expected);
    let expected = [
        ("norm".to_owned(), vec![1.5, 0.0]),
        ("bias".to_owned(), Vec::new()),
    ];
    assert_eq!(first.tensors, expected);
    assert_eq!(first.outcome.seconds["solve"], 1.5);
    assert!(journal.finished(2, source).unwrap().is_none());
    journal.discard().unwrap();
    assert!(matches!(
        Journal::open(&output, Resume::Required),
        Err(Error::Missing { .. })
    ));
}

#[test]
fn a_journal_without_a_layer_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("out");
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    journal.bind(&fingerprint()).unwrap();
    let pending = journal.pending().unwrap();
    pending.write_file("a", b"1").unwrap();
    drop((pending, journal));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn what_a_killed_process_left_is_swept() {
    let (_home, output) = earlier_run();
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    let dir = journal.dir().to_path_buf();
    // Neither destructor runs when a process is killed.
    std::mem::forget(journal.pending().unwrap());
    std::mem::forget(LayerWriter::create(journal.layer_path(2)).unwrap());
    drop(journal);
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    let mut left = names(&dir).unwrap();
    left.sort();
    let expected = ["layer-00000.vlmq", "layer-00001.vlmq", LOCK_FILE, RUN_FILE];
    assert_eq!(left, expected);
    drop(journal);
    let journal = Journal::open(&output, Resume::Never).unwrap();
    assert_eq!(journal.n_finished().unwrap(), 0);
}

#[test]
fn one_process_at_a_time() {
    let (_home, output) = earlier_run();
    let first = Journal::open(&output, Resume::Auto).unwrap();
    let second = Journal::open(&output, Resume::Auto);
    assert!(matches!(second, Err(Error::Busy { .. })));
    assert_eq!(first.n_finished().unwrap(), 2);
}

#[test]
fn another_run_is_told_apart_by_each_part() {
    let (_home, output) = earlier_run();
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    let other = |change: fn(&mut Fingerprint)| {
        let mut other = fingerprint();
        change(&mut other);
        journal.bind(&other).unwrap_err().to_string()
    };
    assert!(other(|f| f.vlmq = "2".into()).contains("other version of vlmq"));
    assert!(other(|f| f.settings = "t".into()).contains("other settings"));
    assert!(other(|f| f.samples = "y".into()).contains("other samples"));
    let weights = journal.finished(1, || Ok("another".into()));
    let weights = weights.err().unwrap().to_string();
    assert!(weights.contains("other weights of layer 1"), "{weights}");
}

#[test]
fn a_damaged_run_file_is_named() {
    let (_home, output) = earlier_run();
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    fs::write(journal.dir().join(RUN_FILE), b"{\"vlmq\":").unwrap();
    let error = journal.bind(&fingerprint()).unwrap_err().to_string();
    assert!(error.contains(RUN_FILE), "{error}");
    assert_eq!(journal.n_finished().unwrap(), 2);
}

#[test]
fn a_layer_under_another_number_is_refused() {
    let (_home, output) = earlier_run();
    let journal = Journal::open(&output, Resume::Auto).unwrap();
    fs::copy(journal.layer_path(0), journal.layer_path(1)).unwrap();
    let error = journal.finished(1, source).err().unwrap().to_string();
    assert!(error.contains("layer 0 found, 1 expected"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn any_damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0u8..8, cut: bool) {
        let (_home, output) = earlier_run();
        let journal = Journal::open(&output, Resume::Auto).unwrap();
        let path = journal.layer_path(0);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        match cut {
            true => bytes.truncate(at),
            false => bytes[at] ^= 1 << bit,
        }
        fs::write(&path, bytes).unwrap();
        let error = journal.finished(0, source).err().unwrap().to_string();
        prop_assert!(error.contains("layer-00000.vlmq"), "{}", error);
        prop_assert!(journal.finished(1, source).unwrap().is_some());
    }
}
