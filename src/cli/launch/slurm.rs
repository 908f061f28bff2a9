//! What Slurm tells the tasks of a step, which is what `srun` starts: the ranks of a run, without any
//! other launcher.
//!
//! They meet at the step's first machine and a port that follows from the numbers of job and step, so
//! that runs beside each other have their own. `MASTER_ADDR` and `MASTER_PORT` say otherwise.
//! The script of a job is no step, and a process alone.

use super::{Lookup, PATIENCE, check_rank, number, port};
use crate::distributed::Rendezvous;
use crate::{Error, Result};

/// Tasks of this step.
pub const N_TASKS: &str = "SLURM_STEP_NUM_TASKS";

/// Ports that no system gives out by itself, nor usually any service has.
const FIRST_PORT: usize = 20_000;
const N_PORTS: usize = 10_000;

/// Steps of one job that have ports of their own.
const N_STEPS: usize = 32;

/// Where the tasks of a step meet; `None` for a process that is none, or the only one.
///
/// # Errors
/// [`Error::Invalid`] for what is no number, or not there beside the rest.
pub fn rendezvous(variable: Lookup) -> Result<Option<Rendezvous>> {
    let n_ranks = number(variable, N_TASKS)?.unwrap_or(1);
    if n_ranks <= 1 {
        return Ok(None);
    }
    let rank = number(variable, "SLURM_PROCID")?.ok_or_else(|| absent("SLURM_PROCID"))?;
    check_rank(("SLURM_PROCID", rank), (N_TASKS, n_ranks))?;
    let first = || variable("SLURM_STEP_NODELIST").map(|list| first_host(&list));
    let host = variable("MASTER_ADDR").or_else(first);
    let job = number(variable, "SLURM_JOB_ID")?.unwrap_or(0);
    let step = number(variable, "SLURM_STEP_ID")?.unwrap_or(0);
    Ok(Some(Rendezvous {
        rank,
        n_ranks,
        host: host.ok_or_else(|| absent("SLURM_STEP_NODELIST"))?,
        port: port(variable, Some(own_port(job, step)))?,
        patience: PATIENCE,
    }))
}

fn absent(name: &str) -> Error {
    Error::Invalid {
        what: name.into(),
        why: "not set, though srun has started several tasks; start them with torchrun or mpirun"
            .into(),
    }
}

/// Tasks of this step on this machine; `None` where Slurm does not tell.
pub fn n_local_tasks(variable: Lookup) -> Option<usize> {
    let counts = variable("SLURM_STEP_TASKS_PER_NODE")?;
    let node: usize = variable("SLURM_NODEID")?.parse().ok()?;
    count_of(&counts, node)
}

/// The count of the machine with the number `node` in a list as `2(x3),1`.
fn count_of(list: &str, node: usize) -> Option<usize> {
    let mut end = 0usize;
    for part in list.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1usize),
        };
        end = end.saturating_add(times);
        if node < end {
            return count.parse().ok();
        }
    }
    None
}

/// The first machine of a list as `gpu[07-09,12]n[1-4],login`: `gpu07n1`.
fn first_host(list: &str) -> String {
    let mut host = String::new();
    let mut rest = list;
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            return host;
        }
        let (range, after) = rest[at + 1..]
            .split_once(']')
            .unwrap_or((&rest[at + 1..], ""));
        host.extend(range.chars().take_while(|c| !matches!(c, '-' | ',')));
        rest = after;
    }
    host + rest
}

fn own_port(job: usize, step: usize) -> u16 {
    let number = job.wrapping_mul(N_STEPS).wrapping_add(step % N_STEPS);
    (FIRST_PORT + number % N_PORTS) as u16
}

#[cfg(test)]
mod tests {
    use super::super::tests::environment;
    use super::*;

    fn meeting(variables: &[(&str, &str)]) -> Result<Option<Rendezvous>> {
        rendezvous(&environment(variables))
    }

    #[test]
    fn tasks_of_a_step_meet_at_its_first_machine() {
        let step = [
            ("SLURM_JOB_ID", "1234567"),
            ("SLURM_STEP_ID", "2"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
            ("SLURM_PROCID", "9"),
        ];
        let at = meeting(&step).unwrap().unwrap();
        assert_eq!((at.rank, at.n_ranks, &at.host[..]), (9, 16, "gpu07"));
        assert!((20_000..30_000).contains(&at.port));
        let other = [&step[..], &[("SLURM_STEP_ID", "3")]].concat();
        assert_ne!(meeting(&other).unwrap().unwrap().port, at.port);
        let said = [
            &step[..],
            &[("MASTER_ADDR", "10.0.0.7"), ("MASTER_PORT", "29500")],
        ]
        .concat();
        let at = meeting(&said).unwrap().unwrap();
        assert_eq!((&at.host[..], at.port), ("10.0.0.7", 29_500));
        // A step of one task, and a job's script, which has the job's tasks but is no step.
        let one = [&step[..], &[("SLURM_STEP_NUM_TASKS", "1")]].concat();
        assert!(meeting(&one).unwrap().is_none());
        let script = [("SLURM_NTASKS", "16"), ("SLURM_PROCID", "0")];
        assert!(meeting(&script).unwrap().is_none());
        for wrong in [
            ("SLURM_PROCID", "16"),
            ("SLURM_PROCID", "x"),
            ("MASTER_PORT", "70000"),
        ] {
            let error = meeting(&[&step[..], &[wrong]].concat()).unwrap_err();
            assert!(error.to_string().contains(wrong.0), "{error}");
        }
        let error = meeting(&step[..4]).unwrap_err();
        assert!(error.to_string().contains("SLURM_PROCID"), "{error}");
    }

    #[test]
    fn the_first_of_a_list_of_machines_is_found() {
        for (list, host) in [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("gpu[07-09,12]", "gpu07"),
            ("gpu[12,07]", "gpu12"),
            ("rack[3-4]n[1-4],login", "rack3n1"),
            ("a[1]-ib,b", "a1-ib"),
            ("broken[5", "broken5"),
        ] {
            assert_eq!(first_host(list), host, "{list}");
        }
    }

    #[test]
    fn tasks_of_a_machine_are_counted() {
        let count = |list: &str, node| count_of(list, node);
        assert_eq!((count("4", 0), count("4", 1)), (Some(4), None));
        let of_list = [0, 1, 2, 3, 4].map(|node| count("2(x3),1", node));
        assert_eq!(of_list, [Some(2), Some(2), Some(2), Some(1), None]);
        assert_eq!(count("x", 0), None);
        assert_eq!(count("2(x", 0), None);
    }
}
