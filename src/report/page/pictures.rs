//! The importance of single tokens: over the image, and over the words of the conversation.
//!
//! One scale of colour serves all layers, so that they can be compared: steps of equal ratio between
//! the 2nd and the 98th percentile of all kept weights. What is drawn here for one layer the page's
//! script draws for any other, by the same rules.

use super::percent;
use crate::report::importance::{ImportanceFile, ShownImage, ShownSample, TokenGrid, TokenRun};
use crate::report::{Deviation, RunReport};
use serde::Serialize;
use std::collections::BTreeMap;

/// Steps of colour.
const LEVELS: f64 = 9.0;

/// Tokens that are told by themselves.
const N_HEAVIEST: usize = 8;

pub(super) enum PicturesOrWhyNot {
    Pictures(Box<Pictures>),
    WhyNot(String),
}

/// What the template draws, and what the script needs for the rest.
#[derive(Serialize)]
pub(super) struct Pictures {
    samples: Vec<SamplePicture>,
    /// Layer and role that are drawn without the script.
    layer_idx: usize,
    projection: String,
    n_layers: usize,
    projections: Vec<String>,
    /// The lowest and the highest step's edge as multiples of the mean.
    ends: [String; 2],
    data: Data,
}

/// log₂ ω of the lowest and the highest step's edge.
#[derive(Clone, Copy, Serialize)]
struct Scale {
    low: f64,
    high: f64,
}

#[derive(Serialize)]
struct Data {
    scale: Scale,
    samples: Vec<SampleData>,
    /// Of each layer each role's weights, as they are kept.
    layers: Vec<BTreeMap<String, Vec<String>>>,
    /// Why a role has no weights in a layer.
    why_not: Vec<BTreeMap<String, String>>,
}

#[derive(Serialize)]
struct SampleData {
    runs: Vec<TokenRun>,
    images: Vec<Vec<TokenGrid>>,
}

#[derive(Serialize)]
struct SamplePicture {
    id: String,
    images: Vec<ImagePicture>,
    runs: Vec<RunPicture>,
    /// What the token is, and its weight.
    heaviest: Vec<[String; 2]>,
    /// Class, its share of the tokens, its share of the weight.
    shares: Vec<[String; 3]>,
}

#[derive(Serialize)]
struct ImagePicture {
    png: String,
    width: usize,
    height: usize,
    views: Vec<View>,
}

/// One drawing over the image; of an image in tiles there may be one more of the whole.
#[derive(Serialize)]
struct View {
    name: &'static str,
    cells: Vec<ImageCell>,
}

#[derive(Serialize)]
struct ImageCell {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    level: u8,
}

#[derive(Serialize)]
struct RunPicture {
    class: String,
    n_tokens: usize,
    /// Of a run of image tokens, which have no words: their mean weight and its step.
    mean: String,
    level: u8,
    tokens: Vec<TokenPicture>,
}

#[derive(Serialize)]
struct TokenPicture {
    text: String,
    level: u8,
}

impl Pictures {
    pub(super) fn of(report: &RunReport, file: Option<&ImportanceFile>) -> PicturesOrWhyNot {
        let Some(file) = file else {
            return PicturesOrWhyNot::WhyNot(why_no_file(report));
        };
        let Some((layer_idx, projection)) = shown_first(file) else {
            let why = "In no layer of this run do tokens have weights of their own.";
            return PicturesOrWhyNot::WhyNot(why.into());
        };
        let projections = projections(file);
        let scale = Scale::of(file);
        let samples = file.samples.iter().enumerate().map(|(i, sample)| {
            let of_layer = file.layers[layer_idx].iter();
            let kept = of_layer.filter(|kept| kept.projection == projection);
            let weights = kept.filter_map(|kept| kept.decoded(i)).next();
            SamplePicture::of(sample, &weights.unwrap_or_default(), scale)
        });
        PicturesOrWhyNot::Pictures(Box::new(Self {
            samples: samples.collect(),
            layer_idx,
            n_layers: file.layers.len(),
            ends: [scale.low, scale.high].map(|log| format!("{:.2}", log.exp2())),
            data: Data {
                scale,
                samples: file.samples.iter().map(SampleData::of).collect(),
                layers: file.layers.iter().map(|layer| by_role(layer)).collect(),
                why_not: (0..file.layers.len())
                    .map(|layer_idx| why_not(report, file, layer_idx, &projections))
                    .collect(),
            },
            projection,
            projections,
        }))
    }
}

fn by_role(layer: &[crate::report::importance::KeptWeights]) -> BTreeMap<String, Vec<String>> {
    let roles = layer.iter();
    roles
        .map(|kept| (kept.projection.clone(), kept.samples.clone()))
        .collect()
}

/// Why a run has no weights to draw.
fn why_no_file(report: &RunReport) -> String {
    let method = &report.method;
    if report.modules.iter().any(|m| m.weight_share.is_some()) {
        return "This run kept no token weights; one with vlmq quantize --report does.".into();
    }
    match &report.calibration {
        Some(_) => {
            format!("The method {method} counts all tokens alike: there is nothing to draw.")
        }
        None => format!("The method {method} looks at no samples: there is nothing to draw."),
    }
}

/// The middle one of the layers with weights, and the first role that has any in it.
fn shown_first(file: &ImportanceFile) -> Option<(usize, String)> {
    let layers = file.layers.iter().enumerate();
    let weighted = layers.filter_map(|(i, layer)| Some((i, layer.first()?.projection.clone())));
    let weighted: Vec<(usize, String)> = weighted.collect();
    weighted.get(weighted.len() / 2).cloned()
}

/// Roles that have weights in any layer, in solving order.
fn projections(file: &ImportanceFile) -> Vec<String> {
    let mut found = Vec::new();
    for kept in file.layers.iter().flatten() {
        if !found.contains(&kept.projection) {
            found.push(kept.projection.clone());
        }
    }
    found
}

/// Of every role without weights in the layer, why.
fn why_not(
    report: &RunReport,
    file: &ImportanceFile,
    layer_idx: usize,
    projections: &[String],
) -> BTreeMap<String, String> {
    let has = |role: &&String| {
        file.layers[layer_idx]
            .iter()
            .any(|kept| kept.projection == **role)
    };
    let reason = |role: &String| {
        let told = report
            .deviations
            .iter()
            .find_map(|deviation| match deviation {
                Deviation::UniformWeights {
                    layer_idx: at,
                    projection,
                    reason,
                } if *at == layer_idx && projection == role => Some(reason.to_string()),
                _ => None,
            });
        let own = |m: &&crate::report::ModuleReport| {
            m.layer_idx == layer_idx && m.name.ends_with(role.as_str())
        };
        let is_weighted = report
            .modules
            .iter()
            .find(own)
            .is_some_and(|m| m.weight_share.is_some());
        match told {
            Some(reason) => format!("All tokens weigh alike here: {reason}."),
            None if is_weighted => "The weights were not kept: an earlier run without --report \
                                    finished this layer."
                .into(),
            None => "This linear was not quantized with token weights.".into(),
        }
    };
    let without = projections.iter().filter(|role| !has(role));
    without.map(|role| (role.clone(), reason(role))).collect()
}

impl Scale {
    fn of(file: &ImportanceFile) -> Self {
        let kept = file.layers.iter().flatten();
        let all = kept.flat_map(|kept| {
            let samples = 0..kept.samples.len();
            samples.filter_map(|i| kept.decoded(i)).flatten()
        });
        let mut logs: Vec<f32> = all.filter(|w| *w > 0.0).map(f32::log2).collect();
        logs.sort_unstable_by(f32::total_cmp);
        let at = |share: f64| {
            let i = (share * logs.len().saturating_sub(1) as f64) as usize;
            f64::from(logs.get(i).copied().unwrap_or(0.0))
        };
        let low = (2.0 * at(0.02)).floor() / 2.0;
        let high = (2.0 * at(0.98)).ceil() / 2.0;
        Self {
            low,
            high: high.max(low + 1.0),
        }
    }

    fn level(self, weight: f32) -> u8 {
        if weight <= 0.0 {
            return 0;
        }
        let up = (f64::from(weight.log2()) - self.low) / (self.high - self.low);
        (up * LEVELS).floor().clamp(0.0, LEVELS - 1.0) as u8
    }
}

impl SampleData {
    fn of(sample: &ShownSample) -> Self {
        Self {
            runs: sample.runs.clone(),
            images: sample.images.iter().map(|i| i.grids.clone()).collect(),
        }
    }
}

impl SamplePicture {
    fn of(sample: &ShownSample, weights: &[f32], scale: Scale) -> Self {
        let (mut runs, mut classes, mut names, mut of_images) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut rest = weights;
        for run in &sample.runs {
            let (own, later) = rest.split_at(run.n_tokens.min(rest.len()));
            rest = later;
            classes.extend(std::iter::repeat_n(run.class.as_str(), own.len()));
            match run.texts.is_empty() {
                true => names.extend(std::iter::repeat_n(String::new(), own.len())),
                false => names.extend(run.texts.iter().map(|text| format!("{text:?}"))),
            }
            if run.class == "vision" {
                of_images.extend_from_slice(own);
            }
            runs.push(RunPicture::of(run, own, scale));
        }
        let places = sample
            .images
            .iter()
            .enumerate()
            .flat_map(|(i, image)| places(i, image));
        let mut places = places.collect::<Vec<String>>().into_iter();
        let unnamed = names.iter_mut().zip(&classes);
        for (name, _) in unnamed.filter(|(_, class)| **class == "vision") {
            *name = places.next().unwrap_or_default();
        }
        let mut of_images = of_images.as_slice();
        let images = sample.images.iter().map(|image| {
            let (own, later) = of_images.split_at(image.n_tokens.min(of_images.len()));
            of_images = later;
            ImagePicture::of(image, own, scale)
        });
        Self {
            id: sample.id.clone(),
            images: images.collect(),
            runs,
            heaviest: heaviest(weights, &names, &classes),
            shares: shares(weights, &classes),
        }
    }
}

/// Where each token of an image lies.
fn places(image_idx: usize, image: &ShownImage) -> Vec<String> {
    let n = image_idx + 1;
    if image.grids.is_empty() {
        return (1..=image.n_tokens)
            .map(|i| format!("image {n}, token {i}"))
            .collect();
    }
    let grids = image.grids.iter().enumerate();
    let cells = grids.flat_map(|(part, grid)| {
        let part = match image.grids.len() {
            1 => String::new(),
            _ => format!(" part {},", part + 1),
        };
        let cols = grid.cols;
        (0..grid.rows * cols).map(move |i| {
            let (row, col) = (i / cols + 1, i % cols + 1);
            format!("image {n},{part} row {row}, column {col}")
        })
    });
    cells.collect()
}

fn heaviest(weights: &[f32], names: &[String], classes: &[&str]) -> Vec<[String; 2]> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let named = order.into_iter().take(N_HEAVIEST).map(|i| {
        let name = match classes[i] {
            "vision" => names[i].clone(),
            class => format!("{} ({class})", names[i]),
        };
        [name, times(weights[i])]
    });
    named.collect()
}

/// Classes in order of their names, as the script has them too.
fn shares(weights: &[f32], classes: &[&str]) -> Vec<[String; 3]> {
    let mut sums: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for (weight, class) in weights.iter().zip(classes) {
        let sum = sums.entry(class).or_default();
        sum.0 += 1;
        sum.1 += f64::from(*weight);
    }
    let all: f64 = sums.values().map(|(_, weight)| weight).sum();
    let rows = sums.into_iter().map(|(class, (n, weight))| {
        let of_tokens = percent(n as f64 / weights.len().max(1) as f64);
        [
            class.to_owned(),
            of_tokens,
            percent(weight / all.max(f64::MIN_POSITIVE)),
        ]
    });
    rows.collect()
}

/// A weight as a multiple of the mean over all samples.
fn times(weight: f32) -> String {
    match weight {
        w if w >= 10.0 => format!("{w:.0} ×"),
        w if w >= 1.0 => format!("{w:.1} ×"),
        w => format!("{w:.2} ×"),
    }
}

impl ImagePicture {
    fn of(image: &ShownImage, weights: &[f32], scale: Scale) -> Self {
        let is_whole = |grid: &TokenGrid| grid.area == [0.0, 0.0, 1.0, 1.0];
        let mut weights = weights.iter();
        let (mut whole, mut tiles) = (Vec::new(), Vec::new());
        for grid in &image.grids {
            let cells = match is_whole(grid) {
                true => &mut whole,
                false => &mut tiles,
            };
            let [left, top, width, height] = grid.area;
            let w = image.width as f64 * width / grid.cols as f64;
            let h = image.height as f64 * height / grid.rows as f64;
            let (left, top) = (image.width as f64 * left, image.height as f64 * top);
            let places = (0..grid.rows).flat_map(|row| (0..grid.cols).map(move |col| (row, col)));
            for (row, col) in places {
                cells.push(ImageCell {
                    x: round(left + w * col as f64),
                    y: round(top + h * row as f64),
                    width: round(w),
                    height: round(h),
                    level: weights.next().map_or(0, |weight| scale.level(*weight)),
                });
            }
        }
        let views = [("the image in tiles", tiles), ("the whole image", whole)];
        let views = views.into_iter().filter(|(_, cells)| !cells.is_empty());
        Self {
            png: image.png.clone(),
            width: image.width,
            height: image.height,
            views: views.map(|(name, cells)| View { name, cells }).collect(),
        }
    }
}

impl RunPicture {
    fn of(run: &TokenRun, weights: &[f32], scale: Scale) -> Self {
        let mean = weights.iter().sum::<f32>() / weights.len().max(1) as f32;
        let tokens = run
            .texts
            .iter()
            .zip(weights)
            .map(|(text, weight)| TokenPicture {
                text: text.replace('\n', "⏎"),
                level: scale.level(*weight),
            });
        Self {
            class: run.class.clone(),
            n_tokens: run.n_tokens,
            mean: times(mean),
            level: scale.level(mean),
            tokens: tokens.collect(),
        }
    }
}

/// To a hundredth of a pixel.
fn round(at: f64) -> f64 {
    (at * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::importance::{KeptWeights, SCHEMA};

    fn file(weights: Vec<f32>) -> ImportanceFile {
        let run = |class: &str, n_tokens: usize, texts: &[&str]| TokenRun {
            class: class.into(),
            n_tokens,
            texts: texts.iter().map(|text| (*text).into()).collect(),
        };
        ImportanceFile {
            schema: SCHEMA,
            samples: vec![ShownSample {
                id: "s".into(),
                images: vec![ShownImage {
                    png: String::new(),
                    width: 40,
                    height: 20,
                    n_tokens: 2,
                    grids: vec![TokenGrid {
                        rows: 1,
                        cols: 2,
                        area: [0.0, 0.0, 1.0, 1.0],
                    }],
                }],
                runs: vec![
                    run("special", 1, &["<s>"]),
                    run("vision", 2, &[]),
                    run("answer", 1, &["\n"]),
                ],
            }],
            layers: vec![
                Vec::new(),
                vec![KeptWeights::of("self_attn.q_proj", &[weights], &[0])],
            ],
        }
    }

    #[test]
    fn cells_words_and_shares_are_of_their_tokens() {
        let file = file(vec![1.0, 0.25, 4.0, 2.75]);
        let report = RunReport::default();
        let PicturesOrWhyNot::Pictures(found) = Pictures::of(&report, Some(&file)) else {
            panic!("there is something to draw");
        };
        assert_eq!(
            (found.layer_idx, found.projection.as_str()),
            (1, "self_attn.q_proj")
        );
        let sample = &found.samples[0];
        let cells = &sample.images[0].views[0].cells;
        let drawn: Vec<(f64, u8)> = cells.iter().map(|cell| (cell.x, cell.level)).collect();
        assert_eq!(drawn, [(0.0, 0), (20.0, 8)]);
        assert_eq!(sample.runs[2].tokens[0].text, "⏎");
        assert_eq!(sample.heaviest[0], ["image 1, row 1, column 2", "4.0 ×"]);
        assert_eq!(sample.heaviest[1], ["\"\\n\" (answer)", "2.8 ×"]);
        assert_eq!(sample.shares[2], ["vision", "50 %", "53 %"]);
        let why = &found.data.why_not[0]["self_attn.q_proj"];
        assert!(why.contains("not quantized with token weights"), "{why}");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let mut report = RunReport {
            method: "rtn".into(),
            ..RunReport::default()
        };
        let PicturesOrWhyNot::WhyNot(why) = Pictures::of(&report, None) else {
            panic!("there is nothing to draw");
        };
        assert!(why.contains("looks at no samples"), "{why}");
        report.deviations = vec![
            serde_json::from_value(serde_json::json!({
                "kind": "uniform_weights", "layer_idx": 0, "projection": "self_attn.q_proj",
                "reason": "vanishing_residual",
            }))
            .unwrap(),
        ];
        let file = file(vec![1.0; 4]);
        let roles = projections(&file);
        let why = why_not(&report, &file, 0, &roles);
        assert!(
            why["self_attn.q_proj"].contains("nothing is quantized before"),
            "{why:?}"
        );
        assert!(why_not(&report, &file, 1, &roles).is_empty());
    }
}
