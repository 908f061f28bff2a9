//! The token weights of a few calibration samples, kept for the pictures of the report: how much each
//! token counts in each linear, the image as it was seen, the words of the conversation.
//!
//! A layer's weights lie in its finished file as soon as it is solved, so that a run which is ended
//! and goes on has those of all layers.

use crate::calibration::{CalibrationSample, encode};
use crate::dataset::{Content, ImageSource, Sample};
use crate::processor::{Filter, Processor, RgbImage, TokenClass, VisionInput, resize};
use crate::{Error, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use half::f16;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of [`ImportanceFile`]'s form.
pub const SCHEMA: u32 = 1;

/// Name of the file in an output folder.
pub const IMPORTANCE_FILE: &str = "vlmq_importance.json";

/// Samples that are kept.
const N_SAMPLES: usize = 3;

/// Longest side of a kept image, in pixels.
const MAX_SIDE: usize = 448;

/// What a run keeps for the pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImportanceFile {
    /// Version of this form.
    pub schema: u32,
    /// The samples.
    pub samples: Vec<ShownSample>,
    /// Of each layer the weights of every role whose tokens do not weigh alike.
    pub layers: Vec<Vec<KeptWeights>>,
}

/// Token weights ω of the linears with one role in one layer; their mean over the tokens of all
/// calibration samples is near 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptWeights {
    /// The role, as `self_attn.q_proj`.
    pub projection: String,
    /// Of each kept sample one f16 per token, little-endian, as base64.
    pub samples: Vec<String>,
}

/// One calibration sample, or the first piece of a long text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShownSample {
    /// Its id in the file.
    pub id: String,
    /// Its images, in order of their tokens.
    pub images: Vec<ShownImage>,
    /// All tokens, those of one class that follow one another together.
    pub runs: Vec<TokenRun>,
}

/// An image of a sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShownImage {
    /// PNG as base64, made smaller where a side is longer than 448 pixels.
    pub png: String,
    /// Columns of the PNG.
    pub width: usize,
    /// Rows of the PNG.
    pub height: usize,
    /// Tokens that stand for it.
    pub n_tokens: usize,
    /// Where they lie in it, row by row, grid after grid; empty where that cannot be told.
    pub grids: Vec<TokenGrid>,
}

/// Tokens that share out a part of an image evenly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenGrid {
    /// Tokens below each other.
    pub rows: usize,
    /// Tokens beside each other.
    pub cols: usize,
    /// Left edge, top edge, width and height of the part, as shares of the image's sides.
    pub area: [f64; 4],
}

/// Tokens of one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRun {
    /// `vision`, `prompt`, `answer`, `special` or `text`.
    pub class: String,
    /// How many.
    pub n_tokens: usize,
    /// What each of them says; empty for vision.
    pub texts: Vec<String>,
}

impl KeptWeights {
    /// Those of the samples `kept`, of all samples' `weights [sample][token]`.
    pub fn of(projection: &str, weights: &[Vec<f32>], kept: &[usize]) -> Self {
        let kept = kept.iter().filter_map(|i| weights.get(*i));
        Self {
            projection: projection.to_owned(),
            samples: kept.map(|sample| encoded(sample)).collect(),
        }
    }

    /// The weights of one kept sample; `None` if they are damaged or there is no such sample.
    pub fn decoded(&self, sample_idx: usize) -> Option<Vec<f32>> {
        let bytes = STANDARD.decode(self.samples.get(sample_idx)?).ok()?;
        let (numbers, []) = bytes.as_chunks::<2>() else {
            return None;
        };
        let values = numbers.iter().map(|b| f16::from_le_bytes(*b).to_f32());
        Some(values.collect())
    }
}

fn encoded(weights: &[f32]) -> String {
    let most = f16::MAX.to_f32();
    let numbers = weights.iter().map(|w| f16::from_f32(w.min(most)));
    let bytes: Vec<u8> = numbers.flat_map(f16::to_le_bytes).collect();
    STANDARD.encode(bytes)
}

impl ImportanceFile {
    /// The file of a folder; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if it is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(IMPORTANCE_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, "read", e)),
        };
        let file: Self = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(&path, "JSON", e.to_string()))?;
        file.check()
            .map_err(|why| Error::format(&path, "samples", why))?;
        Ok(Some(file))
    }

    /// Name and content of its file.
    pub fn to_file(&self) -> (String, Vec<u8>) {
        let mut bytes = serde_json::to_vec(self).expect("all keys are text");
        bytes.push(b'\n');
        (IMPORTANCE_FILE.to_owned(), bytes)
    }

    /// Whether numbers of tokens agree; says what does not.
    fn check(&self) -> std::result::Result<(), String> {
        if self.schema != SCHEMA {
            return Err(format!("schema {} found, {SCHEMA} expected", self.schema));
        }
        for (i, sample) in self.samples.iter().enumerate() {
            let n_tokens: usize = sample.runs.iter().map(|run| run.n_tokens).sum();
            let vision = sample.runs.iter().filter(|run| run.class == "vision");
            let n_vision: usize = vision.map(|run| run.n_tokens).sum();
            let of_images: usize = sample.images.iter().map(|image| image.n_tokens).sum();
            let has_texts =
                |run: &TokenRun| run.class == "vision" || run.texts.len() == run.n_tokens;
            let has_grids = |image: &ShownImage| {
                let cells = image.grids.iter().map(|g| g.rows.saturating_mul(g.cols));
                image.grids.is_empty() || cells.sum::<usize>() == image.n_tokens
            };
            let texts_agree = sample.runs.iter().all(has_texts);
            if n_vision != of_images || !texts_agree || !sample.images.iter().all(has_grids) {
                return Err(format!("the tokens of sample {i} do not add up"));
            }
            for weights in self.layers.iter().flatten() {
                if weights.decoded(i).is_none_or(|w| w.len() != n_tokens) {
                    let role = &weights.projection;
                    return Err(format!("{role} has no {n_tokens} weights for sample {i}"));
                }
            }
        }
        Ok(())
    }
}

/// Which samples of a run are kept: the first with images, and others where these are few.
pub fn kept_samples(samples: &[CalibrationSample]) -> Vec<usize> {
    let has_image = |i: &usize| samples[*i].classes.contains(&TokenClass::Vision);
    let (with, without): (Vec<usize>, Vec<usize>) = (0..samples.len()).partition(has_image);
    let mut kept: Vec<usize> = with.into_iter().chain(without).take(N_SAMPLES).collect();
    kept.sort_unstable();
    kept
}

/// What a picture shows of the samples `kept`, which were made of those `chosen`, raw texts in
/// pieces of at most `max_tokens`.
///
/// # Errors
/// The reader's, the processor's; [`Error::Missing`] if a sample is of none that was chosen.
pub fn shown_samples(
    processor: &Processor,
    chosen: &[&Sample],
    samples: &[CalibrationSample],
    kept: &[usize],
    max_tokens: usize,
) -> Result<Vec<ShownSample>> {
    let one = |i: &usize| {
        let origin = &samples[*i].origin;
        let lost = || Error::Missing {
            what: origin.clone(),
            place: "the chosen samples".into(),
        };
        let sample = chosen.iter().find(|sample| sample.origin == *origin);
        let sample = sample.ok_or_else(lost)?;
        let inputs = encode(processor, sample, max_tokens)?;
        let input = inputs.get(samples[*i].piece).ok_or_else(lost)?;
        let images: &[ImageSource] = match &sample.content {
            Content::Chat { images, .. } => images,
            Content::Text(_) => &[],
        };
        let images = images.iter().zip(&input.images);
        let shown = images.map(|(source, input)| ShownImage::of(processor, &source.load()?, input));
        Ok(ShownSample {
            id: sample.id.clone(),
            images: shown.collect::<Result<_>>()?,
            runs: runs(processor, &input.input_ids, &input.classes)?,
        })
    };
    kept.iter().map(one).collect()
}

impl ShownImage {
    fn of(processor: &Processor, image: &RgbImage, input: &VisionInput) -> Result<Self> {
        let small = fit(image, MAX_SIDE)?;
        let grids = match processor.shows_whole_image() {
            true => token_grids(input).unwrap_or_default(),
            false => Vec::new(),
        };
        Ok(Self {
            png: png_base64(&small)?,
            width: small.width,
            height: small.height,
            n_tokens: input.n_tokens,
            grids,
        })
    }
}

/// The image with no side longer than `max_side`.
pub(super) fn fit(image: &RgbImage, max_side: usize) -> Result<RgbImage> {
    let longest = image.width.max(image.height);
    if longest <= max_side {
        return Ok(image.clone());
    }
    let scaled = |side: usize| (side * max_side / longest).max(1);
    let (width, height) = (scaled(image.width), scaled(image.height));
    resize(image, width, height, Filter::Bicubic)
}

pub(super) fn png_base64(image: &RgbImage) -> Result<String> {
    let mut bytes = Vec::new();
    let (width, height) = (image.width as u32, image.height as u32);
    let written = PngEncoder::new(&mut bytes).write_image(
        &image.data,
        width,
        height,
        ExtendedColorType::Rgb8,
    );
    written.map_err(|e| Error::Invalid {
        what: "an image of the report".into(),
        why: e.to_string(),
    })?;
    Ok(STANDARD.encode(bytes))
}

/// Where the tokens of a tower lie that sees all of an image, and merges squares of patches: in
/// one grid, or in a grid for each tile and one more for a whole view after them.
fn token_grids(input: &VisionInput) -> Option<Vec<TokenGrid>> {
    const WHOLE: [f64; 4] = [0.0, 0.0, 1.0, 1.0];
    let [n_views, height, width] = input.grid_thw;
    let per_view = input.n_tokens.checked_div(n_views)?;
    let fits = |m: &usize| {
        height.is_multiple_of(*m)
            && width.is_multiple_of(*m)
            && height * width / (m * m) == per_view
    };
    let merge = (1..=height.min(width)).find(fits)?;
    let grid = |area| TokenGrid {
        rows: height / merge,
        cols: width / merge,
        area,
    };
    if per_view * n_views != input.n_tokens {
        return None;
    }
    let Some(tiling) = input.tiling else {
        return (n_views == 1).then(|| vec![grid(WHOLE)]);
    };
    let (rows, cols) = (tiling.rows, tiling.cols);
    let n_whole = n_views.checked_sub(rows.checked_mul(cols)?)?;
    if n_whole > 1 {
        return None;
    }
    let (w, h) = (1.0 / cols as f64, 1.0 / rows as f64);
    let places = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
    let tiles = places.map(|(row, col)| grid([col as f64 * w, row as f64 * h, w, h]));
    Some(tiles.chain((n_whole == 1).then(|| grid(WHOLE))).collect())
}

fn runs(processor: &Processor, ids: &[u32], classes: &[TokenClass]) -> Result<Vec<TokenRun>> {
    let mut runs = Vec::new();
    let mut start = 0;
    for part in classes.chunk_by(|a, b| a == b) {
        let texts = match part[0] {
            TokenClass::Vision => Vec::new(),
            _ => processor.token_texts(ids, start..start + part.len())?,
        };
        runs.push(TokenRun {
            class: part[0].name().to_owned(),
            n_tokens: part.len(),
            texts,
        });
        start += part.len();
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Matrix;
    use crate::processor::Tiling;

    fn input(grid_thw: [usize; 3], n_tokens: usize, tiles: Option<[usize; 2]>) -> VisionInput {
        VisionInput {
            patches: Matrix::zeros(1, 1),
            grid_thw,
            n_tokens,
            tiling: tiles.map(|[rows, cols]| Tiling {
                rows,
                cols,
                height: 8,
                width: 8,
            }),
        }
    }

    #[test]
    fn tokens_share_out_the_image_or_its_tiles() {
        let whole = token_grids(&input([1, 6, 8], 12, None)).unwrap();
        assert_eq!((whole[0].rows, whole[0].cols), (3, 4));
        assert_eq!(whole[0].area, [0.0, 0.0, 1.0, 1.0]);
        let tiled = token_grids(&input([3, 4, 4], 12, Some([1, 2]))).unwrap();
        let areas: Vec<[f64; 4]> = tiled.iter().map(|grid| grid.area).collect();
        assert_eq!(
            areas,
            [
                [0.0, 0.0, 0.5, 1.0],
                [0.5, 0.0, 0.5, 1.0],
                [0.0, 0.0, 1.0, 1.0]
            ]
        );
        assert_eq!((tiled[0].rows, tiled[0].cols), (2, 2));
        // A token more than the patches make, as where rows end in one of their own.
        assert!(token_grids(&input([1, 6, 8], 13, None)).is_none());
        assert!(token_grids(&input([2, 4, 4], 8, None)).is_none());
        assert!(token_grids(&input([0, 4, 4], 0, None)).is_none());
    }

    #[test]
    fn weights_come_back_to_a_half_precision() {
        let weights = [vec![0.0], vec![0.25, 1e9, 3.0], vec![1.0]];
        let kept = KeptWeights::of("self_attn.q_proj", &weights, &[1, 2]);
        assert_eq!(kept.decoded(0).unwrap(), [0.25, 65504.0, 3.0]);
        assert_eq!(kept.decoded(1).unwrap(), [1.0]);
        assert!(kept.decoded(2).is_none());
    }

    fn file() -> ImportanceFile {
        ImportanceFile {
            schema: SCHEMA,
            samples: vec![ShownSample {
                id: "a".into(),
                images: Vec::new(),
                runs: vec![TokenRun {
                    class: "prompt".into(),
                    n_tokens: 2,
                    texts: vec!["x".into(), "y".into()],
                }],
            }],
            layers: vec![vec![KeptWeights::of("q", &[vec![1.0, 2.0]], &[0])]],
        }
    }

    #[test]
    fn files_whose_tokens_do_not_add_up_are_refused() {
        assert_eq!(file().check(), Ok(()));
        let mut short = file();
        short.layers[0][0] = KeptWeights::of("q", &[vec![1.0]], &[0]);
        assert!(short.check().unwrap_err().contains("no 2 weights"));
        let mut untold = file();
        untold.samples[0].runs[0].texts.pop();
        assert!(untold.check().unwrap_err().contains("add up"));
        let mut other = file();
        other.schema = 9;
        assert!(other.check().unwrap_err().contains("schema 9"));
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ImportanceFile::read(dir.path()).unwrap(), None);
        let (name, bytes) = file().to_file();
        std::fs::write(dir.path().join(name), bytes).unwrap();
        assert_eq!(ImportanceFile::read(dir.path()).unwrap(), Some(file()));
    }
}
