//! What a group's linears are solved with, made of its sums.
//!
//! α on held-out samples takes two factors, of all samples and of a part of them. In a team they are made
//! side by side: members in even places make that of all, those in odd places that of the part, and
//! neighbours hand each other R and D, which are what each would have made of the same sums.

use super::Run;
use super::group::Task;
use super::inputs::Summed;
use crate::Result;
use crate::distributed::Communicator;
use crate::distributed::message::{Message, Received};
use crate::engine::{Factor, Unfactored};
use crate::solver::{Damped, HandedTriangle, SolverSettings};
use crate::statistics::{InputSquares, Statistics};
use std::collections::BTreeMap;

/// A factor, and what is known beside it.
pub(super) struct Prepared {
    pub(super) factor: Factor,
    pub(super) known: Known,
}

/// What is known of a group beside its factor.
pub(super) struct Known {
    pub(super) group: usize,
    pub(super) effective_sample_size: f64,
    /// Whether α was to be found on samples held out, and none could be.
    pub(super) is_unjudged: bool,
    pub(super) weight_share: Option<BTreeMap<String, f64>>,
    /// At the rank that tells them.
    pub(super) squares: Option<InputSquares>,
}

/// Sums that are to be factored.
struct Moments {
    whole: Statistics,
    /// Of the part, where α is to be found with it.
    part: Option<Statistics>,
    known: Known,
}

/// One of two factors, and the moments of the other.
struct Half {
    made: Factor,
    left: Unfactored,
    is_part: bool,
}

/// How far a rank of a team comes by itself.
enum Begun {
    /// Where there is one factor, or none.
    Done(Option<Prepared>),
    Half(Half, Known),
}

impl Run<'_> {
    /// By this rank alone; `None` where no token was seen.
    pub(super) fn prepared(&mut self, task: &Task<'_>, summed: Summed) -> Result<Option<Prepared>> {
        let moments = Moments::of(task, summed);
        let prepared = moments.map(|moments| self.factored(task, moments));
        prepared.transpose()
    }

    /// The same in teams, at whose meeting all ranks are, those without a group as well.
    pub(super) fn prepared_in_team(
        &mut self,
        own: Option<(Task<'_>, Summed)>,
    ) -> Result<Option<Prepared>> {
        let begun = match own {
            Some((task, summed)) => Some((task, self.begun(&task, summed)?)),
            None => None,
        };
        let triangle = match &begun {
            Some((task, Begun::Half(half, _))) => Some((task, half.made.triangle()?)),
            _ => None,
        };
        let handed = self.timed("exchange", |run| exchanged(run.communicator, triangle))?;
        match begun {
            Some((_, Begun::Half(half, known))) => {
                let handed = handed.expect("a neighbour has the other");
                let factor = self.timed("factor", |run| half.joined(handed, &run.recipe.solver))?;
                Ok(Some(Prepared { factor, known }))
            }
            Some((_, Begun::Done(prepared))) => Ok(prepared),
            None => Ok(None),
        }
    }

    fn begun(&mut self, task: &Task<'_>, summed: Summed) -> Result<Begun> {
        let Some(moments) = Moments::of(task, summed) else {
            return Ok(Begun::Done(None));
        };
        match moments {
            // Whether there is a part is the same in all of a team, which has the same sums.
            Moments {
                whole,
                part: Some(part),
                known,
            } if task.team.len() > 1 => {
                let half = self.timed("factor", |run| run.half(task, whole, part))?;
                Ok(Begun::Half(half, known))
            }
            moments => Ok(Begun::Done(Some(self.factored(task, moments)?))),
        }
    }

    fn factored(&mut self, task: &Task<'_>, moments: Moments) -> Result<Prepared> {
        let Moments { whole, part, known } = moments;
        let factor = self.timed("factor", |run| {
            let made = |statistics| {
                let moments = run.unfactored(task, statistics)?;
                moments.factor(task.name(), &run.recipe.solver)
            };
            let factor = made(whole)?;
            Ok(match part {
                Some(part) => factor.with_part(made(part)?),
                None => factor,
            })
        })?;
        Ok(Prepared { factor, known })
    }

    fn half(&self, task: &Task<'_>, whole: Statistics, part: Statistics) -> Result<Half> {
        let (whole, part) = (self.unfactored(task, whole)?, self.unfactored(task, part)?);
        let is_part = task.makes_part(task.place);
        let (made, left) = match is_part {
            true => (part, whole),
            false => (whole, part),
        };
        Ok(Half {
            made: made.factor(task.name(), &self.recipe.solver)?,
            left,
            is_part,
        })
    }

    fn unfactored(&self, task: &Task<'_>, statistics: Statistics) -> Result<Unfactored> {
        Unfactored::new(self.engine, task.name(), statistics, &self.recipe.solver)
    }
}

impl Moments {
    fn of(task: &Task<'_>, summed: Summed) -> Option<Self> {
        let Summed {
            statistics,
            part,
            weight_share,
        } = summed;
        let whole = statistics.weight_sum();
        let first = task.group.modules.first()?;
        if first.slot.expert.is_some() && whole == 0.0 {
            return None;
        }
        let names = task.group.modules.iter().map(|module| module.name.clone());
        let squares = || statistics.input_squares(names.collect());
        // Where all samples or none are in the part, nothing is held out.
        let is_judged = |p: &Statistics| p.weight_sum() > 0.0 && p.weight_sum() < whole;
        let is_unjudged = part.as_ref().is_some_and(|part| !is_judged(part));
        let known = Known {
            group: task.index,
            effective_sample_size: statistics.effective_sample_size(),
            is_unjudged,
            weight_share: weight_share.map(|share| share.by_name()),
            squares: (task.place == 0).then(squares),
        };
        Some(Self {
            part: part.filter(|_| !is_unjudged),
            whole: statistics,
            known,
        })
    }
}

impl Half {
    fn joined(self, handed: HandedTriangle, settings: &SolverSettings) -> Result<Factor> {
        let other = self.left.with_triangle(handed, settings)?;
        Ok(match self.is_part {
            true => other.with_part(self.made),
            false => self.made.with_part(other),
        })
    }
}

impl Task<'_> {
    /// Which of two factors the member in a place makes.
    fn makes_part(&self, place: usize) -> bool {
        place % 2 == 1
    }

    /// The place of the member that hands the one in `place` the factor that this does not make.
    fn giver(&self, place: usize) -> usize {
        match self.makes_part(place) || place + 1 == self.team.len() {
            true => place - 1,
            false => place + 1,
        }
    }
}

/// Brings each member of a team the triangle that it did not make.
fn exchanged(
    communicator: &dyn Communicator,
    own: Option<(&Task<'_>, HandedTriangle)>,
) -> Result<Option<HandedTriangle>> {
    let mut receivers = Vec::new();
    let mut message = Vec::new();
    if let Some((task, triangle)) = &own {
        let places = 0..task.team.len();
        let places = places.filter(|place| task.giver(*place) == task.place);
        receivers = places.map(|place| task.team[place]).collect();
        message = as_message(triangle);
    }
    let task = own.map(|(task, _)| task);
    let to = |rank: usize| match receivers.contains(&rank) {
        true => &message[..],
        false => &[],
    };
    let outgoing: Vec<&[u8]> = (0..communicator.n_ranks()).map(to).collect();
    let received = communicator.all_to_all(&outgoing)?;
    let read = |task: &Task<'_>| {
        let giver = task.team[task.giver(task.place)];
        from_message(giver, &received[giver], task.group.in_features())
    };
    task.map(read).transpose()
}

fn as_message(triangle: &HandedTriangle) -> Vec<u8> {
    let mut message = Message::new(&triangle.damped);
    message.f32s(&triangle.pivots);
    message.f32s(&triangle.unit_upper);
    message.into_bytes()
}

fn from_message(rank: usize, bytes: &[u8], n: usize) -> Result<HandedTriangle> {
    let (damped, mut rest): (Damped, _) = Received::open(rank, bytes)?;
    let triangle = HandedTriangle {
        pivots: rest.f32s(n)?,
        unit_upper: rest.f32s(n * n.saturating_sub(1) / 2)?,
        damped,
    };
    rest.end()?;
    Ok(triangle)
}

#[cfg(test)]
mod tests {
    use super::super::inputs::Shared;
    use super::*;

    /// Everybody is handed the factor that is not made there, by one of the team.
    #[test]
    fn neighbours_have_both_factors() {
        let group = Shared::of(Vec::new());
        for n in 2..8 {
            let team: Vec<usize> = (10..10 + n).collect();
            let task = Task {
                index: 0,
                group: &group,
                team: &team,
                place: 0,
            };
            for place in 0..n {
                let giver = task.giver(place);
                assert!(giver < n);
                assert_ne!(task.makes_part(giver), task.makes_part(place));
            }
        }
    }

    #[test]
    fn a_triangle_arrives_as_it_was_and_one_of_another_size_is_refused() {
        let triangle = HandedTriangle {
            unit_upper: vec![0.5, -1.0 / 3.0, 7.0],
            pivots: vec![1.0, 0.25, 3.0],
            damped: Damped {
                tried: vec![0.01],
                used: 0.02,
            },
        };
        let bytes = as_message(&triangle);
        let found = from_message(3, &bytes, 3).unwrap();
        assert_eq!(found.unit_upper, triangle.unit_upper);
        assert_eq!(found.pivots, triangle.pivots);
        assert_eq!((found.damped.tried, found.damped.used), (vec![0.01], 0.02));
        for n in [0, 2, 4] {
            assert!(from_message(3, &bytes, n).is_err());
        }
    }
}
