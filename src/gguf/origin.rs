//! Where the tensors of a file come from, and the way back.
//!
//! llama.cpp has names, orders and cuts of its own. A file of ours says under the key [`ORIGINS`] what
//! each of its tensors is made of, one text of JSON for each in the order of the table, so that the
//! checkpoint can be put together again without knowing the family. Other readers pass over the key.

use crate::checkpoint::DType;
use crate::plan::Scheme;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The key that lists the [`Origin`] of every tensor.
pub(crate) const ORIGINS: &str = "vlmq.origins";

/// What a tensor is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Origin {
    /// The codes of a quantized linear.
    Packed {
        /// Its checkpoint name.
        module: String,
        /// Order of its rows.
        rows: Rows,
        /// Its number format, with scales as the file has them.
        scheme: Scheme,
    },
    /// A stored tensor of floats.
    Stored {
        /// Its name.
        tensor: String,
        /// Type of its elements.
        dtype: DType,
        /// What is taken of it.
        part: Part,
        /// Whether the file has each value plus one: norms that multiply by one plus their weight.
        adds_one: bool,
    },
    /// Numbers that follow from the configuration.
    Computed {
        /// These numbers; the file has them as the tensor.
        #[serde(skip)]
        values: Vec<f32>,
    },
}

impl Origin {
    /// The text that says it.
    pub(crate) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("names and numbers always are JSON")
    }

    /// The tensor of the checkpoint, by its name there, and what is taken of it.
    pub(crate) fn place(&self) -> Option<(String, Part)> {
        match self {
            Self::Packed { module, rows, .. } => Some((format!("{module}.weight"), rows.part())),
            Self::Stored { tensor, part, .. } => Some((tensor.clone(), part.clone())),
            Self::Computed { .. } => None,
        }
    }

    /// What a text says; `None` if it is no such text.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// Order of a linear's rows in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Rows {
    /// As they are.
    Same,
    /// Each head's rows i and i + half beside each other: llama.cpp turns neighbours of Llama-type
    /// models together, where checkpoints have the two halves of a head.
    Paired {
        /// Heads that the rows are of.
        n_heads: usize,
    },
}

impl Rows {
    /// What a tensor in this order is of the one that it is made of.
    pub(crate) fn part(self) -> Part {
        match self {
            Self::Same => Part::Whole,
            Self::Paired { .. } => Part::Ordered(self),
        }
    }

    /// The row that stands at `row` in the file, of `n` rows.
    pub(crate) fn source_of(self, row: usize, n: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Paired { n_heads } => {
                let head_dim = n / n_heads;
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }

    /// Whether `n` rows can be ordered so.
    pub(crate) fn check(self, module: &str, n: usize) -> Result<()> {
        match self {
            Self::Paired { n_heads } if !n.is_multiple_of(n_heads.saturating_mul(2)) => {
                Err(Error::Invalid {
                    what: module.to_owned(),
                    why: format!("{n} rows are no {n_heads} heads of an even number of channels"),
                })
            }
            _ => Ok(()),
        }
    }
}

/// What is taken of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// All of its rows, in another order.
    Ordered(Rows),
    /// Some of its rows.
    Rows(Range<usize>),
    /// One frame of a convolution `[out, in, frames, height, width]`.
    Frame(usize),
    /// All of a table of positions `[1, rows, width]`, its first row, the class token's, last.
    ClassLast,
}

impl Part {
    /// The shape of the part of a tensor of `shape`.
    pub(crate) fn shape(&self, name: &str, shape: &[usize]) -> Result<Vec<usize>> {
        let found = match self {
            Self::Whole => Some(shape.to_vec()),
            Self::Ordered(rows) => {
                let n = shape.first().copied().unwrap_or(0);
                rows.check(name, n)?;
                Some(shape.to_vec())
            }
            Self::Rows(rows) => {
                let fits = shape.first().is_some_and(|n| rows.end <= *n);
                fits.then(|| [&[rows.len()], &shape[1..]].concat())
            }
            Self::Frame(frame) => match shape {
                [out, inp, frames, height, width] if frame < frames => {
                    Some(vec![*out, *inp, *height, *width])
                }
                _ => None,
            },
            Self::ClassLast => (shape.len() == 3 && shape[0] == 1).then(|| shape.to_vec()),
        };
        found.ok_or_else(|| Error::Unsupported {
            what: format!("{name} of shape {shape:?} in a GGUF file; {self:?} of it was expected"),
        })
    }

    /// The bytes of the part, of a tensor's `bytes`, whose elements have `size`.
    pub(crate) fn of(&self, bytes: Vec<u8>, shape: &[usize], size: usize) -> Vec<u8> {
        match self {
            Self::Whole => bytes,
            Self::Ordered(rows) => {
                let n = shape[0];
                let row_bytes = bytes.len() / n;
                let sources = (0..n).map(|row| rows.source_of(row, n));
                sources
                    .flat_map(|row| bytes[row * row_bytes..][..row_bytes].to_vec())
                    .collect()
            }
            Self::Rows(rows) => {
                let row_bytes = bytes.len() / shape[0];
                bytes[rows.start * row_bytes..rows.end * row_bytes].to_vec()
            }
            Self::Frame(frame) => {
                let plane = shape[3] * shape[4] * size;
                let planes = bytes.chunks_exact(plane).skip(*frame).step_by(shape[2]);
                planes.flatten().copied().collect()
            }
            Self::ClassLast => {
                let mut bytes = bytes;
                bytes.rotate_left(shape[2] * size);
                bytes
            }
        }
    }

    /// Where it stands among the parts of one tensor.
    fn order(&self) -> usize {
        match self {
            Self::Whole | Self::Ordered(_) | Self::ClassLast => 0,
            Self::Rows(rows) => rows.start,
            Self::Frame(frame) => *frame,
        }
    }
}

/// A tensor of a checkpoint as the parts of it that a file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Each with its shape in the file and where its bytes are.
    parts: Vec<(Part, Vec<usize>, Range<usize>)>,
}

impl Parts {
    /// Adds one.
    pub(crate) fn add(&mut self, part: Part, shape: Vec<usize>, bytes: Range<usize>) {
        let place = self
            .parts
            .partition_point(|(other, ..)| other.order() <= part.order());
        self.parts.insert(place, (part, shape, bytes));
    }

    /// Where the bytes of the only part are, if it is the whole tensor as it is.
    pub(crate) fn in_one_piece(&self) -> Option<&Range<usize>> {
        match &self.parts[..] {
            [(Part::Whole, _, bytes)] => Some(bytes),
            _ => None,
        }
    }

    /// Where the bytes of each part are.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = &Range<usize>> {
        self.parts.iter().map(|(_, _, bytes)| bytes)
    }

    /// The shape of the tensor that they make up; `None` if they make up none.
    pub(crate) fn shape(&self) -> Option<Vec<usize>> {
        let (first, shape, _) = self.parts.first()?;
        if shape.is_empty() || shape.contains(&0) {
            return None;
        }
        let mut whole = shape.clone();
        match first {
            Part::Whole | Part::Ordered(_) | Part::ClassLast if self.parts.len() > 1 => {
                return None;
            }
            Part::Whole => {}
            Part::ClassLast if shape.len() == 3 && shape[0] == 1 => {}
            Part::ClassLast => return None,
            Part::Ordered(rows) => rows.check("", shape[0]).ok()?,
            Part::Rows(_) => whole[0] = self.n_rows(&shape[1..])?,
            Part::Frame(_) => whole.insert(2, self.n_frames(shape)?),
        }
        Some(whole)
    }

    /// All rows, if the parts are runs of them without a gap.
    fn n_rows(&self, row: &[usize]) -> Option<usize> {
        let mut parts = self.parts.iter();
        parts.try_fold(0, |end, (part, shape, _)| match part {
            Part::Rows(rows) if rows.start == end && shape[1..] == *row => {
                (rows.len() == shape[0]).then_some(rows.end)
            }
            _ => None,
        })
    }

    /// All frames, if the parts are these.
    fn n_frames(&self, frame: &[usize]) -> Option<usize> {
        let mut parts = self.parts.iter();
        let next = |n: usize, (part, shape, _): &(Part, Vec<usize>, _)| {
            (*part == Part::Frame(n) && shape == frame).then_some(n + 1)
        };
        let n = parts.try_fold(0, next)?;
        (frame.len() == 4).then_some(n)
    }

    /// The bytes of the tensor from those of its parts, if they make up one, whose elements have
    /// `size`.
    pub(crate) fn join(&self, parts: &[Vec<u8>], size: usize) -> Vec<u8> {
        match self.parts.first() {
            Some((Part::Ordered(rows), shape, _)) => {
                let (n, row_bytes) = (shape[0], parts[0].len() / shape[0]);
                let mut whole = vec![0; parts[0].len()];
                for (row, bytes) in parts[0].chunks_exact(row_bytes).enumerate() {
                    let to = rows.source_of(row, n) * row_bytes;
                    whole[to..to + row_bytes].copy_from_slice(bytes);
                }
                whole
            }
            Some((Part::Frame(_), shape, _)) => {
                let plane = shape[2] * shape[3] * size;
                let starts = (0..parts[0].len()).step_by(plane);
                let planes = starts.flat_map(|at| parts.iter().map(move |p| &p[at..at + plane]));
                planes.flatten().copied().collect()
            }
            Some((Part::ClassLast, shape, _)) => {
                let mut whole = parts.concat();
                whole.rotate_right(shape[2] * size);
                whole
            }
            _ => parts.concat(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;

    #[test]
    fn rows_of_heads_are_paired() {
        let rows = Rows::Paired { n_heads: 2 };
        let order: Vec<usize> = (0..12).map(|row| rows.source_of(row, 12)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert!(rows.check("q", 12).is_ok());
        assert!(rows.check("q", 10).is_err());
        assert_eq!(Rows::Same.source_of(5, 12), 5);
    }

    #[test]
    fn parts_are_cut_out() {
        let bytes: Vec<u8> = (0..24).collect();
        let shape = [2, 1, 3, 2, 2];
        let frame = Part::Frame(1);
        assert_eq!(frame.shape("conv", &shape).unwrap(), [2, 1, 2, 2]);
        assert_eq!(
            frame.of(bytes.clone(), &shape, 1),
            [4, 5, 6, 7, 16, 17, 18, 19]
        );
        let rows = Part::Rows(1..2);
        assert_eq!(rows.shape("qkv", &[3, 8]).unwrap(), [1, 8]);
        assert_eq!(rows.of(bytes, &[3, 8], 1), [8, 9, 10, 11, 12, 13, 14, 15]);
        for (part, shape) in [
            (Part::Frame(3), &[2, 1, 3, 2, 2][..]),
            (Part::Frame(0), &[2, 1, 3, 2]),
            (Part::Rows(2..4), &[3, 8]),
        ] {
            assert!(part.shape("name", shape).is_err());
        }
    }

    #[test]
    fn parts_are_put_together_again() {
        let bytes: Vec<u8> = (0..96).collect();
        let paired = Part::Ordered(Rows::Paired { n_heads: 2 });
        let cases: [(&[usize], Vec<Part>); 5] = [
            (&[8, 12], vec![Part::Whole]),
            (&[1, 6, 16], vec![Part::ClassLast]),
            (&[12, 8], vec![paired]),
            (
                &[6, 16],
                vec![Part::Rows(4..6), Part::Rows(0..1), Part::Rows(1..4)],
            ),
            (&[2, 3, 4, 2, 2], [3, 0, 2, 1].map(Part::Frame).to_vec()),
        ];
        for (shape, cut) in cases {
            let mut parts = Parts::default();
            let mut in_file = Vec::new();
            for part in cut {
                let start = in_file.len();
                in_file.extend(part.of(bytes.clone(), shape, 1));
                let found = part.shape("name", shape).unwrap();
                parts.add(part, found, start..in_file.len());
            }
            assert_eq!(parts.shape().as_deref(), Some(shape));
            let read: Vec<Vec<u8>> = parts
                .ranges()
                .map(|r| in_file[r.clone()].to_vec())
                .collect();
            assert_eq!(parts.join(&read, 1), bytes);
        }
    }

    #[test]
    fn parts_that_make_up_no_tensor_are_told() {
        let rows = |start, end| (Part::Rows(start..end), vec![end - start, 4]);
        let heads = |n_heads| (Part::Ordered(Rows::Paired { n_heads }), vec![6, 2]);
        let frame = |n| (Part::Frame(n), vec![2, 3, 2, 2]);
        for bad in [
            vec![rows(1, 3)],
            vec![rows(0, 2), rows(3, 5)],
            vec![rows(0, 2), rows(0, 2)],
            vec![rows(0, 2), (Part::Rows(2..4), vec![2, 5])],
            vec![(Part::Rows(0..3), vec![2, 4])],
            vec![rows(0, 2), (Part::Whole, vec![2, 4])],
            vec![(Part::Whole, vec![2]), (Part::Whole, vec![2])],
            vec![(Part::Whole, vec![2, 0])],
            vec![(Part::ClassLast, vec![2, 3, 4])],
            vec![heads(0)],
            vec![heads(4)],
            vec![heads(usize::MAX)],
            vec![frame(0), frame(2)],
            vec![frame(0), frame(0)],
            vec![(Part::Frame(0), vec![2, 3])],
            vec![],
        ] {
            let mut parts = Parts::default();
            for (part, shape) in bad.clone() {
                parts.add(part, shape, 0..0);
            }
            assert_eq!(parts.shape(), None, "{bad:?}");
        }
    }

    #[test]
    fn origins_are_read_as_they_were_written() {
        let scheme = Scheme::new(3, Some(128), false, ScaleDtype::F16).unwrap();
        for origin in [
            Origin::Packed {
                module: "m".into(),
                rows: Rows::Paired { n_heads: 3 },
                scheme,
            },
            Origin::Stored {
                tensor: "t".into(),
                dtype: DType::Bf16,
                part: Part::Rows(2..5),
                adds_one: true,
            },
            Origin::Computed { values: Vec::new() },
        ] {
            assert_eq!(Origin::from_text(&origin.to_text()), Some(origin));
        }
        for bad in [
            "",
            "{}",
            r#"{"kind":"stored","tensor":"t"}"#,
            r#"{"kind":"other"}"#,
        ] {
            assert_eq!(Origin::from_text(bad), None, "{bad}");
        }
    }
}
