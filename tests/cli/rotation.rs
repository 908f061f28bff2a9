//! A turned residual stream: the same logits, and a folder that can be quantized as any other.

use super::tiny::{Home, N_MODULES, Spelling, read_tensors};
use super::{json, text, vlmq};
use safetensors::tensor::Dtype;
use std::path::Path;

/// Logits of one question about a picture.
pub fn logits(home: &Home, model: &Path, name: &str) -> Vec<f32> {
    let output = home.path().join(name);
    let mut command = vlmq();
    command
        .arg("trace")
        .arg(model)
        .args(["--prompt", "how many?"]);
    command.arg("--image").arg(home.data().join("2.png"));
    let run = command.arg("--output").arg(&output).output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let file = std::fs::read(&output).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let bytes = tensors.tensor("logits").unwrap();
    let values = bytes.data().as_chunks::<4>().0.iter();
    values.map(|b| f32::from_le_bytes(*b)).collect()
}

/// KL divergence of a model from the home's own, whose image features are others.
pub fn divergence(home: &Home, model: &Path) -> f64 {
    let mut command = vlmq();
    command
        .arg("eval")
        .arg(model)
        .arg("--task")
        .arg(home.questions());
    let run = command.arg("--reference").arg(home.model()).arg("--json");
    let run = run.output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let tasks = json(&run.stdout)["tasks"].take();
    tasks["questions"]["kl_per_answer_token"].as_f64().unwrap()
}

fn rotate(model: &Path, output: &Path, flags: &[&str]) -> serde_json::Value {
    let mut command = vlmq();
    command.arg("rotate").arg(model).arg("--output").arg(output);
    let run = command.args(flags).arg("--json").output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    json(&run.stdout)
}

/// Largest difference over largest value.
pub fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    difference / expected.iter().fold(0.0f32, |most, x| most.max(x.abs()))
}

#[test]
fn a_turned_model_gives_the_same_logits() {
    for (spelling, kind) in [
        (Spelling::USUAL, "hadamard"),
        (
            Spelling {
                dtype: Dtype::F16,
                is_tied: false,
                has_new_names: true,
                n_shards: 2,
            },
            "random",
        ),
    ] {
        let home = Home::new(spelling);
        let turned = home.path().join("turned");
        let report = rotate(&home.model(), &turned, &["--float32", "--kind", kind]);
        // Per layer 7 linears and 2 norms; embedding, head, last norm, the merger's linear and bias.
        let n_layers = N_MODULES / 7;
        assert_eq!(report["n_changed"], 9 * n_layers + 5);
        let before = logits(&home, &home.model(), "before");
        let after = logits(&home, &turned, "after");
        // f32 sums in another order, through two layers.
        assert!(relative(&after, &before) < 1e-4, "{kind}");
        let changed = read_tensors(&turned);
        assert_eq!(changed["lm_head.weight"].dtype, Dtype::F32);
        assert!(divergence(&home, &turned) < 1e-6, "{kind}");
        for (name, tensor) in read_tensors(&home.model()) {
            assert_eq!(changed[&name].shape, tensor.shape, "{name}");
        }
    }
}

#[test]
fn a_turned_model_is_quantized_as_any_other() {
    let home = Home::new(Spelling::USUAL);
    let (turned, again) = (home.path().join("turned"), home.path().join("again"));
    rotate(&home.model(), &turned, &[]);
    let mut command = vlmq();
    command.arg("quantize").arg(&turned);
    command.arg("--calibration").arg(home.data());
    command.arg("--output").arg(home.output());
    command.args(["--samples", "4", "--group-size", "32", "--bits", "3"]);
    let run = command.output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert_eq!(read_tensors(&turned)["lm_head.weight"].dtype, Dtype::BF16);
    // The same seed gives the same bytes, and a folder that is there is left alone.
    rotate(&home.model(), &again, &[]);
    assert_eq!(read_tensors(&turned), read_tensors(&again));
    let mut command = vlmq();
    command.arg("rotate").arg(home.model());
    let run = command.arg("--output").arg(&again).output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    let run = vlmq()
        .arg("rotate")
        .arg(home.output())
        .arg("--output")
        .arg(home.path().join("third"))
        .output();
    let run = run.unwrap();
    assert!(text(&run.stderr).contains("quantized already"));
}
