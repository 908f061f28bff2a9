//! Which ranks this process belongs to, as whoever started it tells in the environment.
//!
//! | started by | told in |
//! |---|---|
//! | `torchrun --no-python`, or by hand | `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` |
//! | `mpirun`, `srun --mpi=pmix` | what their MPI library reads (feature `mpi`) |
//! | `srun` | what Slurm says of a step ([`slurm`]) |
//!
//! The first of them that is there counts; without any a process is alone.

mod slurm;

use super::tell;
use crate::distributed::{Alone, Communicator, Rendezvous, Tcp};
use crate::engine::DeviceName;
use crate::{Error, Result};
use std::path::Path;
use std::process::exit;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the first ranks wait for the last.
const PATIENCE: Duration = Duration::from_secs(120);

/// Set by whoever starts ranks with MPI, and how many there are.
const MPI_SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

/// Set by Slurm for programs that use MPI.
const PMIX_RANK: &str = "PMIX_RANK";

/// A variable of the environment by its name.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// How many ranks share this machine.
const LOCAL_SIZES: [&str; 3] = [
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "LOCAL_WORLD_SIZE",
];

/// Which of the ranks on its machine this one is.
const LOCAL_RANKS: [&str; 4] = [
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "LOCAL_RANK",
    "SLURM_LOCALID",
];

/// The exit code of a rank whose run was ended.
const EXIT_CODE: i32 = 2;

/// This process among the ranks of its run.
pub struct Launch {
    communicator: Box<dyn Communicator>,
    teller: Arc<Teller>,
}

/// Tells once why a run has ended, at one rank of all.
struct Teller {
    rank: usize,
    /// Whether the other ranks are ended with this one, and tell nothing.
    is_last_word: bool,
    /// Held while telling: whoever comes second must not end the process before it is done.
    has_told: Mutex<bool>,
}

impl Launch {
    /// Joins the ranks that the environment tells of.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a variable that is no number, [`Error::Unsupported`] for ranks of MPI in
    /// a build without it; those of [`Tcp::connect`].
    pub fn from_environment() -> Result<Self> {
        if let Some(at) = rendezvous(&variable)? {
            return Self::by_tcp(&at);
        }
        if is_of_mpi(&variable) {
            return Self::by_mpi();
        }
        match slurm::rendezvous(&variable)? {
            Some(at) => Self::by_tcp(&at),
            None => Ok(Self::alone()),
        }
    }

    /// One process.
    pub fn alone() -> Self {
        Self::new(Box::new(Alone), true)
    }

    fn new(communicator: Box<dyn Communicator>, is_last_word: bool) -> Self {
        let rank = communicator.rank();
        Self {
            communicator,
            teller: Arc::new(Teller::new(rank, is_last_word)),
        }
    }

    fn by_tcp(at: &Rendezvous) -> Result<Self> {
        let teller = Arc::new(Teller::new(at.rank, false));
        let of_loss = Arc::clone(&teller);
        let on_loss = move |error: &Error| {
            // Finished layers are safe at any time, so nothing is left to tidy up.
            of_loss.tell(error);
            exit(EXIT_CODE);
        };
        Ok(Self {
            communicator: Box::new(Tcp::connect(at, on_loss)?),
            teller,
        })
    }

    #[cfg(feature = "mpi")]
    fn by_mpi() -> Result<Self> {
        Ok(Self::new(Box::new(crate::distributed::Mpi::start()?), true))
    }

    #[cfg(not(feature = "mpi"))]
    fn by_mpi() -> Result<Self> {
        let what = "ranks of MPI in a vlmq that was built without it; build it with --features mpi, or \
                    start ranks with torchrun --no-python or srun --mpi=none";
        Err(Error::Unsupported { what: what.into() })
    }

    /// The ranks.
    pub fn communicator(&self) -> &dyn Communicator {
        &*self.communicator
    }

    /// Whether this process has something to tell and to write.
    pub fn is_first(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// Ends the run at all ranks, if there are others; `note` is told beside the error.
    pub fn end(&self, error: &Error, note: impl FnOnce()) {
        if self.communicator.is_alone() {
            return;
        }
        if self.is_first() {
            note();
        }
        self.teller.tell(error);
        self.communicator.abort(error);
        exit(EXIT_CODE);
    }
}

impl Teller {
    fn new(rank: usize, is_last_word: bool) -> Self {
        Self {
            rank,
            is_last_word,
            has_told: Mutex::new(false),
        }
    }

    /// Rank 0 tells; where it is lost itself, the next one.
    fn tell(&self, error: &Error) {
        let is_told_here = match error {
            Error::RankLost { rank: 0, .. } => self.rank == 1,
            _ => self.rank == 0,
        };
        let is_told_here = is_told_here || self.is_last_word;
        let mut has_told = self.has_told.lock().unwrap_or_else(|e| e.into_inner());
        if is_told_here && !std::mem::replace(&mut *has_told, true) {
            let of_rank = match error {
                Error::Rank { .. } | Error::RankLost { .. } => String::new(),
                _ => format!("rank {}: ", self.rank),
            };
            tell(&format!("error: {of_rank}{error}"));
            tell(&format!("hint: {}", error.hint()));
        }
    }
}

/// Whether an MPI library has the ranks. Slurm's own variables for one are there by many a cluster's
/// default, whoever is started: without the library they say nothing.
fn is_of_mpi(variable: Lookup) -> bool {
    let of_launcher = MPI_SIZES.iter().find_map(|name| variable(name));
    let of_slurm = || variable(PMIX_RANK).and_then(|_| variable(slurm::N_TASKS));
    let of_slurm = cfg!(feature = "mpi").then(of_slurm).flatten();
    of_launcher.or(of_slurm).is_some_and(|size| size != "1")
}

/// Where ranks meet that are started one by one; `None` for a process alone.
fn rendezvous(variable: Lookup) -> Result<Option<Rendezvous>> {
    let n_ranks = number(variable, "WORLD_SIZE")?;
    let rank = number(variable, "RANK")?;
    let (Some(n_ranks), Some(rank), Some(host)) = (n_ranks, rank, variable("MASTER_ADDR")) else {
        return Ok(None);
    };
    if n_ranks <= 1 {
        return Ok(None);
    }
    check_rank(("RANK", rank), ("WORLD_SIZE", n_ranks))?;
    Ok(Some(Rendezvous {
        rank,
        n_ranks,
        host,
        port: port(variable, None)?,
        patience: PATIENCE,
    }))
}

fn check_rank((name, rank): (&str, usize), (of, n_ranks): (&str, usize)) -> Result<()> {
    if rank < n_ranks {
        return Ok(());
    }
    Err(Error::Invalid {
        what: name.into(),
        why: format!("{rank} given, less than {of} ({n_ranks}) expected"),
    })
}

/// The port at which rank 0 listens, `otherwise` where nobody says.
fn port(variable: Lookup, otherwise: Option<u16>) -> Result<u16> {
    // torchrun itself listens at the port that it tells: the next one is taken.
    let next = usize::from(variable("TORCHELASTIC_RUN_ID").is_some());
    let said = match number(variable, "VLMQ_PORT")? {
        Some(port) => Some(port),
        None => number(variable, "MASTER_PORT")?.map(|port| port + next),
    };
    let port = match said {
        Some(port) => u16::try_from(port).ok(),
        None => otherwise,
    };
    port.ok_or_else(|| Error::Invalid {
        what: "MASTER_PORT".into(),
        why: "a port of MASTER_ADDR expected, the same for all ranks".into(),
    })
}

/// A variable that is to be a number.
fn number(variable: Lookup, name: &str) -> Result<Option<usize>> {
    let parsed = variable(name).map(|text| {
        text.parse().map_err(|_| Error::Invalid {
            what: name.into(),
            why: format!("{text:?} given, a number expected"),
        })
    });
    parsed.transpose()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// How many ranks share this machine, 1 if nobody tells.
pub fn n_local_ranks() -> usize {
    let told = first_number(&LOCAL_SIZES, &variable);
    let told = told.or_else(|| slurm::n_local_tasks(&variable));
    told.unwrap_or(1).max(1)
}

/// The first of some variables that is a number.
fn first_number(names: &[&str], variable: Lookup) -> Option<usize> {
    let told = names.iter().filter_map(|name| variable(name));
    told.filter_map(|text| text.parse().ok()).next()
}

/// The device that `text` names; `cuda` is the GPU with the number that this rank has on its machine.
///
/// # Errors
/// [`Error::Invalid`] for what is no device.
pub fn device(text: &str) -> Result<DeviceName> {
    match text {
        "cuda" => Ok(DeviceName::Cuda(local_rank(&variable))),
        named => named.parse(),
    }
}

/// 0 if nobody tells.
fn local_rank(variable: Lookup) -> usize {
    first_number(&LOCAL_RANKS, variable).unwrap_or(0)
}

/// Threads for this process: the cores that it may use, and its part of them where ranks share a
/// machine and were not given cores of their own.
pub fn default_threads() -> Option<usize> {
    let allowed = std::thread::available_parallelism().ok()?.get();
    let online = std::fs::read_to_string(Path::new("/sys/devices/system/cpu/online"));
    let is_bound = online.is_ok_and(|list| allowed < count_in_list(&list));
    match is_bound {
        true => Some(allowed),
        false => Some((allowed / n_local_ranks()).max(1)),
    }
}

/// How many numbers a list as `0-3,8` has; 0 for what is no such list.
fn count_in_list(list: &str) -> usize {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.parse().ok()?;
        let last: usize = last.parse().ok()?;
        Some((last + 1).saturating_sub(first))
    };
    list.trim().split(',').filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An environment of these variables.
    pub(super) fn environment(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables: std::collections::BTreeMap<String, String> =
            variables.iter().map(owned).collect();
        move |name| variables.get(name).cloned()
    }

    fn meeting(variables: &[(&str, &str)]) -> Result<Option<Rendezvous>> {
        rendezvous(&environment(variables))
    }

    #[test]
    fn ranks_meet_where_the_environment_says() {
        let all = [
            ("RANK", "1"),
            ("WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29500"),
        ];
        let at = meeting(&all).unwrap().unwrap();
        assert_eq!(
            (at.rank, at.n_ranks, &at.host[..], at.port),
            (1, 4, "node0", 29500)
        );
        // torchrun listens there itself.
        let with_torchrun = [&all[..], &[("TORCHELASTIC_RUN_ID", "none")]].concat();
        assert_eq!(meeting(&with_torchrun).unwrap().unwrap().port, 29501);
        let with_port = [&with_torchrun[..], &[("VLMQ_PORT", "7")]].concat();
        assert_eq!(meeting(&with_port).unwrap().unwrap().port, 7);
        assert!(meeting(&all[..2]).unwrap().is_none());
        let alone = [&all[..], &[("WORLD_SIZE", "1")]].concat();
        assert!(meeting(&alone).unwrap().is_none());
        for wrong in [("RANK", "4"), ("WORLD_SIZE", "x"), ("MASTER_PORT", "70000")] {
            let error = meeting(&[&all[..], &[wrong]].concat()).unwrap_err();
            assert!(error.to_string().contains(wrong.0), "{error}");
        }
    }

    #[test]
    fn each_rank_of_a_machine_has_a_gpu_of_its_own() {
        let of = |variables: &[(&str, &str)]| local_rank(&environment(variables));
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[("RANK", "11"), ("LOCAL_RANK", "3")]), 3);
        assert_eq!(of(&[("OMPI_COMM_WORLD_LOCAL_RANK", "2")]), 2);
        assert_eq!(of(&[("SLURM_LOCALID", "7")]), 7);
        assert_eq!(device("cuda:5").unwrap(), DeviceName::Cuda(5));
        assert!(device("gpu").is_err());
    }

    #[test]
    fn cores_are_counted_in_lists() {
        assert_eq!(count_in_list("0-15\n"), 16);
        assert_eq!(count_in_list("0,2-3"), 3);
        assert_eq!(count_in_list("none"), 0);
    }
}
