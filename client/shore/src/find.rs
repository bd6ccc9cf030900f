//! What people call a thing, turned into the thing: a whole id, a name, `pod/container`, or the
//! beginning of an id that only one has.

use anyhow::Result;
use longshore_client::{
    Client,
    proto::{Container, ListContainersRequest, ListSandboxesRequest, Sandbox},
};

use crate::{error::Problem, human::short_id};

/// How many of the things that a name could mean are listed in the error.
const SHOWN: usize = 5;

/// The annotation of a pod that `shore run` made for one container: the two live and go together.
pub(crate) const RUN_ANNOTATION: &str = "longshore.shore/run";

/// What is on the node, read once per command.
#[derive(Debug)]
pub(crate) struct Things {
    pub(crate) pods: Vec<Sandbox>,
    pub(crate) containers: Vec<Container>,
}

/// A pod or a container.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Target {
    Pod(Sandbox),
    Container(Container),
}

impl Things {
    pub(crate) async fn read(client: &Client) -> Result<Self> {
        let (pods, containers) = tokio::try_join!(
            client.all_sandboxes(ListSandboxesRequest::default()),
            client.all_containers(ListContainersRequest::default()),
        )?;
        Ok(Self { pods, containers })
    }

    /// The name of a pod, for showing beside its containers.
    pub(crate) fn pod(&self, id: &str) -> Option<&Sandbox> {
        self.pods.iter().find(|pod| pod.id == id)
    }

    pub(crate) fn find_pod(&self, name: &str) -> Result<&Sandbox> {
        one(
            "pod",
            name,
            matching(&self.pods, name, |pod| &pod.id, |pod| pod.name == name),
            |pod| pod.name.clone(),
            |pod| &pod.id,
        )
    }

    /// The container called `name`; the name of a pod with one container will do.
    pub(crate) fn find_container(&self, name: &str) -> Result<&Container> {
        if self.containers_called(name).is_empty()
            && let Ok(pod) = self.find_pod(name)
        {
            let mut inside = self.inside(pod);
            if let (Some(only), None) = (inside.next(), inside.next()) {
                return Ok(only);
            }
        }
        self.find_named_container(name)
    }

    /// The container called `name`, and nothing else.
    pub(crate) fn find_named_container(&self, name: &str) -> Result<&Container> {
        one(
            "container",
            name,
            self.containers_called(name),
            |found| self.full_name(found),
            |found| &found.id,
        )
    }

    /// The pod or container called `name`.
    ///
    /// The container of a pod that `run` made stands for its pod: they are stopped and removed
    /// together. One that was added later stands for itself.
    pub(crate) fn find(&self, name: &str) -> Result<Target> {
        let containers = self.containers_called(name);
        let pods = matching(&self.pods, name, |pod| &pod.id, |pod| pod.name == name);
        if containers.is_empty() && pods.is_empty() {
            return Err(Problem::NotFound {
                kind: "pod or container",
                name: name.to_owned(),
            }
            .into());
        }
        if containers.is_empty() {
            return self.find_pod(name).cloned().map(Target::Pod);
        }
        let container = one(
            "container",
            name,
            containers,
            |found| self.full_name(found),
            |found| &found.id,
        )?;
        if let Some(pod) = self.pod(&container.sandbox_id)
            && pod.annotations.contains_key(RUN_ANNOTATION)
            && (self.inside(pod).count() == 1 || pods.iter().any(|named| named.id == pod.id))
        {
            return Ok(Target::Pod(pod.clone()));
        }
        match pods.as_slice() {
            [] => Ok(Target::Container(container.clone())),
            pods => Err(Problem::Ambiguous {
                kind: "pod or container",
                name: name.to_owned(),
                count: pods.len() + 1,
                some: format!(
                    "container {}, pod {}",
                    short_id(&container.id),
                    short_id(&pods[0].id)
                ),
            }
            .into()),
        }
    }

    /// `pod/container`, as unique as a container's name gets.
    pub(crate) fn full_name(&self, container: &Container) -> String {
        match self.pod(&container.sandbox_id) {
            Some(pod) => format!("{}/{}", pod.name, container.name),
            None => container.name.clone(),
        }
    }

    fn inside(&self, pod: &Sandbox) -> impl Iterator<Item = &Container> {
        self.containers
            .iter()
            .filter(|one| one.sandbox_id == pod.id)
    }

    fn containers_called(&self, name: &str) -> Vec<&Container> {
        let by_pod = name.split_once('/');
        matching(
            &self.containers,
            name,
            |one| &one.id,
            |one| match by_pod {
                None => one.name == name,
                Some((pod, container)) => {
                    one.name == container
                        && (one.sandbox_id.starts_with(pod)
                            || self
                                .pod(&one.sandbox_id)
                                .is_some_and(|found| found.name == pod))
                }
            },
        )
    }
}

/// The best kind of match there is: the whole id, else the name, else the beginning of the id.
pub(crate) fn matching<'a, T>(
    all: &'a [T],
    text: &str,
    id: impl Fn(&T) -> &String,
    named: impl Fn(&T) -> bool,
) -> Vec<&'a T> {
    let by = |fits: &dyn Fn(&T) -> bool| all.iter().filter(|one| fits(one)).collect::<Vec<_>>();
    let exact = by(&|one| id(one) == text);
    if !exact.is_empty() {
        return exact;
    }
    let named = by(&named);
    if !named.is_empty() || text.is_empty() {
        return named;
    }
    by(&|one| id(one).starts_with(text))
}

fn one<'a, T>(
    kind: &'static str,
    name: &str,
    found: Vec<&'a T>,
    label: impl Fn(&T) -> String,
    id: impl Fn(&T) -> &String,
) -> Result<&'a T> {
    match found.as_slice() {
        [] => Err(Problem::NotFound {
            kind,
            name: name.to_owned(),
        }
        .into()),
        [only] => Ok(only),
        many => Err(Problem::Ambiguous {
            kind,
            name: name.to_owned(),
            count: many.len(),
            some: many
                .iter()
                .take(SHOWN)
                .map(|one| format!("{} ({})", short_id(id(one)), label(one)))
                .collect::<Vec<_>>()
                .join(", "),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, name: &str, run: bool) -> Sandbox {
        let mut pod = Sandbox {
            id: id.into(),
            name: name.into(),
            ..Default::default()
        };
        if run {
            pod.annotations.insert(RUN_ANNOTATION.into(), String::new());
        }
        pod
    }

    fn container(id: &str, name: &str, pod: &str) -> Container {
        Container {
            id: id.into(),
            name: name.into(),
            sandbox_id: pod.into(),
            ..Default::default()
        }
    }

    fn things() -> Things {
        Things {
            pods: vec![
                pod("aa11", "web", true),
                pod("aa22", "db", false),
                pod("bb33", "cache", false),
            ],
            containers: vec![
                container("c111", "web", "aa11"),
                container("c222", "app", "aa22"),
                container("c223", "log", "aa22"),
                container("d444", "app", "bb33"),
            ],
        }
    }

    #[track_caller]
    fn found(name: &str, expected: Result<&str, &str>) {
        let things = things();
        let got = things.find_container(name).map(|found| found.id.as_str());
        match (got, expected) {
            (Ok(id), Ok(expected)) => assert_eq!(id, expected, "{name}"),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (got, _) => panic!("{name}: {got:?}"),
        }
    }

    #[test]
    fn containers_are_found_by_id_prefix_name_and_pod() {
        found("c111", Ok("c111"));
        found("c1", Ok("c111"));
        found("log", Ok("c223"));
        found("db/app", Ok("c222"));
        found("cache/app", Ok("d444"));
        found("bb33/app", Ok("d444"));
        found("cache", Ok("d444"));
        found(
            "app",
            Err("could be 2 containers: c222 (db/app), d444 (cache/app)"),
        );
        found("c22", Err("could be 2 containers"));
        found("db", Err("there is no container `db`"));
        found("nope", Err("there is no container `nope`"));
        found("", Err("there is no container"));
    }

    #[test]
    fn a_container_that_run_made_stands_for_its_pod() {
        let target = |name| match things().find(name).expect("found") {
            Target::Pod(pod) => format!("pod {}", pod.id),
            Target::Container(container) => format!("container {}", container.id),
        };
        assert_eq!(target("web"), "pod aa11");
        assert_eq!(target("c111"), "pod aa11");
        assert_eq!(target("c223"), "container c223");
        assert_eq!(target("db"), "pod aa22");
        assert_eq!(target("aa2"), "pod aa22");
        assert!(things().find("aa").is_err());
    }

    #[test]
    fn a_container_added_to_the_pod_of_another_does_not_take_it_along() {
        let mut things = things();
        things.containers.push(container("f666", "extra", "aa11"));
        let found = |name| things.find(name).expect("found");
        assert!(matches!(found("extra"), Target::Container(_)));
        assert!(matches!(found("web/extra"), Target::Container(_)));
        assert!(matches!(found("c111"), Target::Container(_)));
        assert!(matches!(found("web"), Target::Pod(_)));
    }

    #[test]
    fn a_name_that_pod_and_container_share_is_not_guessed() {
        let mut things = things();
        things.containers.push(container("e555", "cache", "aa22"));
        assert!(things.find("cache").is_err());
    }
}
