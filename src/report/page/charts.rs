//! Where the marks of the charts stand. A chart is drawn from these numbers by the template; each has
//! its table beside it.

use super::{maps, percent, role};
use crate::report::RunReport;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Classes in the order in which they are stacked.
const CLASSES: [&str; 5] = ["vision", "prompt", "answer", "special", "text"];

/// Loss of each layer as a share of its output, on a logarithmic axis, beside that of rounding.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct LossChart {
    width: f64,
    height: f64,
    /// Place and label of the lines across.
    ticks: Vec<Tick>,
    layers: Vec<LossMark>,
    /// Whether rounding to nearest is told.
    has_nearest: bool,
}

#[derive(Debug, PartialEq, Serialize)]
struct Tick {
    at: f64,
    label: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct LossMark {
    layer_idx: usize,
    x: f64,
    own_y: f64,
    nearest_y: Option<f64>,
    own: String,
    nearest: Option<String>,
    ratio: Option<String>,
    /// Whether its number is written below.
    has_label: bool,
}

const LEFT: f64 = 58.0;
const TOP: f64 = 12.0;
const PLOT_HEIGHT: f64 = 220.0;
const BOTTOM: f64 = 40.0;

/// Sums over a layer's linears: loss, loss of rounding, squared output.
type LayerSums = (f64, Option<f64>, f64);

impl LossChart {
    pub(super) fn of(report: &RunReport) -> Option<Self> {
        let layers = layer_losses(report);
        let shares = layers.iter().map(|(layer_idx, (own, nearest, energy))| {
            (*layer_idx, own / energy, nearest.map(|n| n / energy))
        });
        let shares: Vec<(usize, f64, Option<f64>)> = shares.collect();
        let all = shares
            .iter()
            .flat_map(|(_, own, nearest)| [Some(*own), *nearest]);
        let all: Vec<f64> = all.flatten().filter(|share| *share > 0.0).collect();
        let least = all.iter().copied().reduce(f64::min)?.log10().floor();
        let most = all.iter().copied().reduce(f64::max)?.log10().ceil();
        let most = most.max(least + 1.0);
        let y = |share: f64| {
            let up = (share.max(f64::MIN_POSITIVE).log10() - least) / (most - least);
            round(TOP + PLOT_HEIGHT * (1.0 - up.clamp(0.0, 1.0)))
        };
        let step = (640.0 / shares.len() as f64).clamp(14.0, 64.0);
        let every = (26.0 / step).ceil() as usize;
        let mark =
            |(i, &(layer_idx, own, nearest)): (usize, &(usize, f64, Option<f64>))| LossMark {
                layer_idx,
                x: round(LEFT + step * (i as f64 + 0.5)),
                own_y: y(own),
                nearest_y: nearest.map(y),
                own: percent(own),
                nearest: nearest.map(percent),
                ratio: nearest.map(|nearest| percent(own / nearest.max(f64::MIN_POSITIVE))),
                has_label: i % every == 0,
            };
        let ticks = (least as i32..=most as i32).map(|power| {
            let share = 10f64.powi(power);
            Tick {
                at: y(share),
                label: format!("{:.*} %", (-power - 2).max(0) as usize, 100.0 * share),
            }
        });
        Some(Self {
            width: LEFT + step * shares.len() as f64 + 12.0,
            height: TOP + PLOT_HEIGHT + BOTTOM,
            ticks: ticks.collect(),
            has_nearest: shares.iter().any(|(_, _, nearest)| nearest.is_some()),
            layers: shares.iter().enumerate().map(mark).collect(),
        })
    }
}

fn layer_losses(report: &RunReport) -> BTreeMap<usize, LayerSums> {
    let mut layers: BTreeMap<usize, LayerSums> = BTreeMap::new();
    for module in &report.modules {
        if let (Some(loss), Some(energy)) = (module.loss, maps::energy(module)) {
            let layer = layers
                .entry(module.layer_idx)
                .or_insert((0.0, Some(0.0), 0.0));
            layer.0 += loss;
            // Of a part of the linears it would be held against the loss of all.
            layer.1 = layer.1.zip(module.nearest_loss).map(|(sum, own)| sum + own);
            layer.2 += energy;
        }
    }
    layers
}

/// What part of the weight of all tokens each class has, layer by layer, in the linears of one role.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct ShareChart {
    role: String,
    width: f64,
    height: f64,
    /// Classes that any of the bars has.
    classes: Vec<&'static str>,
    /// The tokens themselves first, then the layers.
    bars: Vec<Bar>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Bar {
    /// `None`: of the tokens, each counted once.
    layer_idx: Option<usize>,
    x: f64,
    width: f64,
    parts: Vec<Part>,
    /// Of each of the chart's classes.
    shares: Vec<String>,
    has_label: bool,
}

#[derive(Debug, PartialEq, Serialize)]
struct Part {
    class: &'static str,
    y: f64,
    height: f64,
}

const BAR_TOP: f64 = 8.0;
const BAR_HEIGHT: f64 = 150.0;
const BARS_LEFT: f64 = 46.0;
const BARS_WIDTH: f64 = 330.0;

impl ShareChart {
    /// One for each role whose tokens are weighted.
    pub(super) fn all(report: &RunReport) -> Vec<Self> {
        let mut roles: Vec<String> = Vec::new();
        let mut shares: BTreeMap<(String, usize), Vec<&BTreeMap<String, f64>>> = BTreeMap::new();
        for module in &report.modules {
            if let Some(share) = &module.weight_share {
                let role = role(&module.name);
                if !roles.contains(&role) {
                    roles.push(role.clone());
                }
                let own = shares.entry((role, module.layer_idx)).or_default();
                own.push(share);
            }
        }
        let tokens = token_shares(report);
        let one = |role: &String| {
            let layers = shares.iter().filter(|((of, _), _)| of == role);
            let layers = layers.map(|((_, layer_idx), shares)| (Some(*layer_idx), mean(shares)));
            let tokens = tokens.iter().map(|tokens| (None, tokens.clone()));
            Self::of(role, tokens.chain(layers).collect())
        };
        roles.iter().map(one).collect()
    }

    fn of(role: &str, shares: Vec<(Option<usize>, BTreeMap<String, f64>)>) -> Self {
        let has = |class: &&&str| shares.iter().any(|(_, all)| all.contains_key(**class));
        let classes: Vec<&'static str> = CLASSES.iter().filter(has).copied().collect();
        let gap = 14.0;
        let step = ((BARS_WIDTH - gap) / shares.len() as f64).min(34.0);
        let every = (20.0 / step).ceil() as usize;
        let bar = |(i, (layer_idx, all)): (usize, &(Option<usize>, BTreeMap<String, f64>))| {
            let share = |class: &&str| all.get(*class).copied().unwrap_or(0.0);
            let mut top = BAR_TOP;
            let parts = classes.iter().map(|class| {
                let height = BAR_HEIGHT * share(class);
                let y = top;
                top += height;
                Part {
                    class,
                    y: round(y),
                    height: round(height),
                }
            });
            let after_tokens = f64::from(u8::from(layer_idx.is_some())) * gap;
            Bar {
                layer_idx: *layer_idx,
                x: round(BARS_LEFT + step * i as f64 + after_tokens),
                width: round(step * 0.84),
                parts: parts.collect(),
                shares: classes.iter().map(|class| percent(share(class))).collect(),
                has_label: layer_idx.is_none_or(|layer_idx| layer_idx % every == 0),
            }
        };
        Self {
            role: role.to_owned(),
            width: BARS_LEFT + gap + step * shares.len() as f64 + 4.0,
            height: BAR_TOP + BAR_HEIGHT + 34.0,
            bars: shares.iter().enumerate().map(bar).collect(),
            classes,
        }
    }
}

fn token_shares(report: &RunReport) -> Option<BTreeMap<String, f64>> {
    let counts = &report.calibration.as_ref()?.n_tokens;
    let all = counts.values().sum::<u64>().max(1) as f64;
    let shares = counts
        .iter()
        .map(|(class, n)| (class.clone(), *n as f64 / all));
    Some(shares.collect())
}

/// Of a mixture's experts, each of which counts alike.
fn mean(shares: &[&BTreeMap<String, f64>]) -> BTreeMap<String, f64> {
    let classes: BTreeSet<&String> = shares.iter().flat_map(|share| share.keys()).collect();
    let mean = |class: &String| {
        let sum: f64 = shares.iter().filter_map(|share| share.get(class)).sum();
        (class.clone(), sum / shares.len() as f64)
    };
    classes.into_iter().map(mean).collect()
}

/// To a tenth of a pixel.
fn round(at: f64) -> f64 {
    (at * 10.0).round() / 10.0
}
