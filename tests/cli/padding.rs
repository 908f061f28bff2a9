//! MLPs made wider by zeros: the same logits, and a folder whose parts divide.

use super::rotation::{divergence, logits, relative};
use super::tiny::{HIDDEN, Home, INTER, N_MODULES, Spelling, read_tensors};
use super::{json, text, vlmq};
use safetensors::tensor::Dtype;
use std::path::Path;
use std::process::Output;

fn pad(model: &Path, output: &Path, flags: &[&str]) -> Output {
    let mut command = vlmq();
    command.arg("pad").arg(model).arg("--output").arg(output);
    command.args(flags).arg("--json").output().unwrap()
}

#[test]
fn a_padded_model_gives_the_same_logits() {
    let other = Spelling {
        dtype: Dtype::F16,
        is_tied: false,
        has_new_names: true,
        n_shards: 2,
    };
    for spelling in [Spelling::USUAL, other] {
        let home = Home::new(spelling);
        let padded = home.path().join("padded");
        let run = pad(
            &home.model(),
            &padded,
            &["--for-tp", "2", "--group-size", "80"],
        );
        assert!(run.status.success(), "{}", text(&run.stderr));
        let report = json(&run.stdout)["padded"].take();
        assert_eq!(report["n_changed"], 3 * N_MODULES / 7);
        let (from, to) = (
            report["from"].as_u64().unwrap(),
            report["to"].as_u64().unwrap(),
        );
        assert!(to > from && to.is_multiple_of(160) && to - from < 160);
        let before = logits(&home, &home.model(), "before");
        let after = logits(&home, &padded, "after");
        // Sums with zeros in them, which may be cut otherwise.
        assert!(relative(&after, &before) < 1e-6);
        assert!(divergence(&home, &padded) < 1e-9);
        let (own, grown) = (read_tensors(&home.model()), read_tensors(&padded));
        assert_eq!(own.len(), grown.len());
        let n_same = own.iter().filter(|(name, tensor)| grown[*name] == **tensor);
        assert_eq!(n_same.count(), own.len() - 3 * N_MODULES / 7);
    }
}

#[test]
fn a_padded_model_is_quantized_and_its_parts_divide() {
    let home = Home::new(Spelling::USUAL);
    let padded = home.path().join("padded");
    let run = pad(
        &home.model(),
        &padded,
        &["--for-tp", "2", "--group-size", "48"],
    );
    assert!(run.status.success(), "{}", text(&run.stderr));
    let mut command = vlmq();
    command.arg("quantize").arg(&padded);
    command.arg("--calibration").arg(home.data());
    command.arg("--output").arg(home.output());
    command.args(["--samples", "4", "--group-size", "16", "--bits", "3"]);
    let run = command.output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let mut command = vlmq();
    let run = command.arg("verify").arg(home.output()).arg("--against");
    let run = run.arg(&padded).output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stdout));
    // Channels of zeros stay zeros, whatever the grids.
    let numbers = home.path().join("numbers");
    let mut command = vlmq();
    command.arg("export").arg(home.output()).arg("--output");
    let run = command.arg(&numbers).args(["--format", "f32"]).output();
    assert!(run.unwrap().status.success());
    let mut n_checked = 0;
    for (name, tensor) in read_tensors(&numbers) {
        let added = match name.rsplit('.').nth(1) {
            Some("gate_proj" | "up_proj") => tensor.bytes[4 * INTER * tensor.shape[1]..].to_vec(),
            Some("down_proj") => {
                let rows = tensor.bytes.chunks_exact(4 * tensor.shape[1]);
                rows.flat_map(|row| row[4 * INTER..].to_vec()).collect()
            }
            _ => continue,
        };
        assert_eq!(added.len(), 4 * 64 * HIDDEN);
        assert!(
            added
                .as_chunks::<4>()
                .0
                .iter()
                .all(|b| f32::from_le_bytes(*b) == 0.0),
            "{name}"
        );
        n_checked += 1;
    }
    assert_eq!(n_checked, 3 * N_MODULES / 7);
}

#[test]
fn what_cannot_be_padded_is_told() {
    let home = Home::new(Spelling::USUAL);
    let output = home.path().join("padded");
    for (flags, words) in [
        (
            ["--for-tp", "0", "--group-size", "32"],
            "1 or more expected",
        ),
        (["--for-tp", "1", "--group-size", "1"], "as they are"),
        (["--for-tp", "3", "--group-size", "16"], "cannot be added"),
    ] {
        let run = pad(&home.model(), &output, &flags);
        assert_eq!(run.status.code(), Some(2), "{flags:?}");
        assert!(text(&run.stderr).contains(words), "{}", text(&run.stderr));
        assert!(!output.exists());
    }
    home.edit_json("config.json", |config| {
        config["intermediate_size"] = 96.into();
    });
    let run = pad(
        &home.model(),
        &output,
        &["--for-tp", "2", "--group-size", "80"],
    );
    assert_eq!(run.status.code(), Some(2));
    assert!(!output.exists());
}
