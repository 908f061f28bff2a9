//! Every source of factors against sums written out in f64.

use super::case::{Case, rows};
use super::*;
use crate::importance::factors::Gradients;
use crate::model::projection::Slot;

fn settings(source: ImportanceSource, loss: ImportanceLoss) -> ImportanceSettings {
    ImportanceSettings {
        source,
        loss,
        norm: TokenNorm::Rms,
        ..ImportanceSettings::paper(1.0)
    }
}

/// The layer with all weights moved a little, as rounding does.
fn moved(case: &Case) -> DecoderLayer {
    let mut layer = case.layer.clone();
    for slot in crate::model::projection::slots(&case.config, 0) {
        let linear = case.layer.linear(slot).unwrap();
        let mut w = crate::model::linear::matrix_from_tensor(linear.weight()).unwrap();
        w.data_mut()
            .iter_mut()
            .for_each(|w| *w = (*w * 8.0).round() / 8.0);
        layer.replace(slot, linear.with_weight(w).unwrap());
    }
    layer
}

fn product(x: &Rows, w: &Rows) -> Rows {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let row = |x: &Vec<f64>| w.iter().map(|w| dot(x, w)).collect();
    x.iter().map(row).collect()
}

fn minus(a: &Rows, b: &Rows) -> Rows {
    let row = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a - b).collect();
    a.iter().zip(b).map(row).collect()
}

fn error_gradients(
    case: &Case,
    of: ImportanceSettings,
    rounded: Option<&DecoderLayer>,
) -> Gradients {
    let (full, classes) = (case.full_pass(), case.classes());
    let sample = case.sample(&case.quantized, &full, rounded, &classes);
    of.of_error(&sample, &case.pass(&case.quantized)).unwrap().0
}

#[test]
fn the_linear_loss_is_of_each_linears_own_error() {
    let case = golden();
    let layer = &case.layer;
    let inputs = |x: &Tensor| {
        let pass = case.pass(x);
        let n2 = layer.gate_up_input(&pass.y).unwrap();
        let h = layer.down_input(&n2).unwrap();
        [pass.n1.clone(), pass.trace.output.clone(), n2, h].map(|x| rows(&x))
    };
    let (u, f) = (inputs(&case.quantized), inputs(&case.full));
    let place = |p| match p {
        Projection::Q | Projection::K | Projection::V => 0,
        Projection::O => 1,
        Projection::Gate | Projection::Up => 2,
        Projection::Down => 3,
    };
    let other = moved(&case);
    let w = |layer: &DecoderLayer, p| rows(layer.linear(Slot::from(p)).unwrap().weight());
    for rounded in [None, Some(&other)] {
        let source = match rounded {
            None => ImportanceSource::Drift,
            Some(_) => ImportanceSource::Rounding,
        };
        let all = error_gradients(&case, settings(source, ImportanceLoss::Linear), rounded);
        assert_eq!(all.len(), 7);
        for (p, ours) in all {
            let (u, f) = (&u[place(p)], &f[place(p)]);
            let error = match rounded {
                None => minus(&product(u, &w(layer, p)), &product(f, &w(layer, p))),
                Some(other) => product(u, &minus(&w(layer, p), &w(other, p))),
            };
            let twice: Rows = error
                .iter()
                .map(|r| r.iter().map(|v| 2.0 * v).collect())
                .collect();
            let error = worst(&rows(&ours), &twice);
            assert!(error <= GRADIENT_TOLERANCE, "{p:?}: {error:.2e}");
        }
    }
}

#[test]
fn gradients_of_rounding_are_finite_differences_of_its_loss() {
    const STEP: f64 = 1e-5;
    let case = golden();
    let (naive, other) = (case.naive(), moved(&case));
    let x = rows(&case.quantized);
    let mut rounded = case.naive();
    for (slot, w) in &mut rounded.weights {
        *w = rows(other.linear(*slot).unwrap().weight());
    }
    let target = rounded.forward(&x, &[]);
    for loss_of in [ImportanceLoss::Attention, ImportanceLoss::Layer] {
        let of = settings(ImportanceSource::Rounding, loss_of);
        for (projection, ours) in error_gradients(&case, of, Some(&other)) {
            let value = |token, amount| {
                let amounts = vec![(1, amount)];
                let nudge = Nudge {
                    projection,
                    token,
                    amounts,
                };
                let (y, out) = naive.forward(&x, &[nudge]);
                match loss_of {
                    ImportanceLoss::Layer => loss(&out, &target.1),
                    _ => loss(&y, &target.0),
                }
            };
            let slope = |t| vec![(value(t, STEP) - value(t, -STEP)) / (2.0 * STEP)];
            let ours = rows(&ours);
            let differences: Rows = (0..ours.len()).map(slope).collect();
            let picked: Rows = ours.iter().map(|row| vec![row[1]]).collect();
            let error = worst(&picked, &differences);
            assert!(
                error <= GRADIENT_TOLERANCE,
                "{loss_of:?} {projection:?}: {error:.2e}"
            );
        }
    }
}

/// A mean of n squares of a near-normal has a relative deviation of √(2/n).
#[test]
fn probes_average_to_the_norms_of_the_jacobians_columns() {
    const STEP: f64 = 1e-5;
    const N_PROBES: usize = 600;
    let case = Case::random(qwen3(), &[0; 4], 1);
    let naive = case.naive();
    let x = rows(&case.quantized);
    let source = ImportanceSource::Curvature { n_probes: N_PROBES };
    for loss_of in [ImportanceLoss::Attention, ImportanceLoss::Layer] {
        let (full, classes) = (case.full_pass(), case.classes());
        let sample = case.sample(&case.quantized, &full, None, &classes);
        let pass = case.pass(&case.quantized);
        let of = settings(source, loss_of);
        for (projection, ours) in of.column_norms(&sample, &pass, N_PROBES).unwrap() {
            let ours = rows(&ours);
            for (token, own) in ours.iter().enumerate() {
                let out = |amount| {
                    let amounts = vec![(1, amount)];
                    let (y, out) = naive.forward(
                        &x,
                        &[Nudge {
                            projection,
                            token,
                            amounts,
                        }],
                    );
                    if loss_of == ImportanceLoss::Layer {
                        out
                    } else {
                        y
                    }
                };
                let norm = loss(&out(STEP), &out(-STEP)).sqrt() / (2.0 * STEP);
                let error = (own[1] - norm).abs();
                assert!(
                    error <= 0.25 * norm + 1e-4,
                    "{projection:?}: {error} of {norm}"
                );
            }
        }
    }
}

#[test]
fn attention_received_is_a_sum_of_columns() {
    let case = golden();
    let pass = case.pass(&case.quantized);
    let n = case.images.len();
    let a: Vec<f32> = {
        let all = pass.trace.probabilities(0..n).unwrap();
        all.flatten_all().unwrap().to_vec1().unwrap()
    };
    let mut sums = vec![0.0; n];
    for (i, p) in a.iter().enumerate() {
        sums[i % n] += f64::from(*p);
    }
    let low = sums.iter().copied().fold(f64::MAX, f64::min);
    let high = sums.iter().copied().fold(0.0, f64::max);
    let scaled = |s: &f64| 0.1 + 0.9 * (s - low) / (high - low);
    let scaled: Vec<f64> = sums.iter().map(scaled).collect();
    let mean = scaled.iter().sum::<f64>() / n as f64;
    let of = settings(
        ImportanceSource::Attention { min: 0.1 },
        ImportanceLoss::Attention,
    );
    let all = importance_of(&case, of, &case.quantized, None);
    for projection in Projection::ALL {
        let ours = weights(&all, projection).unwrap();
        for (ours, w) in ours.iter().zip(&scaled) {
            assert!((f64::from(*ours) - w / mean).abs() < 1e-4);
        }
    }
}

#[test]
fn the_first_layer_has_weights_where_drift_is_not_asked_for() {
    let (case, other) = (golden(), moved(&golden()));
    for source in [
        ImportanceSource::Rounding,
        ImportanceSource::Curvature { n_probes: 2 },
        ImportanceSource::Attention { min: 0.005 },
    ] {
        let of = settings(source, ImportanceLoss::Attention);
        let all = importance_of(&case, of, &case.full, Some(&other));
        let found = weights(&all, Projection::Q).unwrap();
        assert!(found.iter().any(|w| (w - 1.0).abs() > 0.01), "{source:?}");
    }
    let of = settings(ImportanceSource::Drift, ImportanceLoss::Linear);
    let same = importance_of(&case, of, &case.full, None);
    let expected = Err(Uniform::VanishingResidual);
    assert_eq!(same.token_weights(Projection::Down, 8), expected);
}

#[test]
fn modules_granularity_and_safeguards_shape_weights() {
    let case = golden();
    let mut of = ImportanceSettings::paper(2.0);
    of.modules = ImportanceModules::O;
    of.granularity = Granularity::Modality;
    let all = importance_of(&case, of, &case.quantized, None);
    assert_eq!(weights(&all, Projection::Q), None);
    let (level, classes) = (weights(&all, Projection::O).unwrap(), case.classes());
    for (i, j) in (0..level.len()).flat_map(|i| (0..i).map(move |j| (i, j))) {
        assert_eq!(level[i] == level[j], classes[i] == classes[j]);
    }
    let mut of = ImportanceSettings::paper(2.0);
    let n = classes.len() as f64;
    of.safeguards.min_ess = Some(0.99 * n / 8.0);
    let all = importance_of(&case, of, &case.quantized, None);
    let found = all.token_weights(Projection::O, 8).unwrap().unwrap();
    let changes = found.safeguarded.unwrap();
    assert!(changes.tempering > 0.0);
    assert!((changes.effective_sample_size / (0.99 * n) - 1.0).abs() < 1e-9);
}
