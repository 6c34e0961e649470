// Command starts measures what the mesh takes of the start of pods: on a real Kubernetes, as many as a node may have are
// created at once, in a namespace outside the mesh and in one inside, in turns. It reads from the agent's log how long each
// of them was held up, from its metrics what processor time and memory that took, and from the pods how long they took to
// start in all.
//
// hack/bench.sh starts brings the cluster up, with one node, and calls it; kubectl is called for everything.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// fullNode is how many captured pods the agent's memory is read with.
	fullNode = 110
	ownGoal  = 20 * time.Millisecond
	// memoryGoal is in bytes.
	memoryGoal = 25 << 20
	// idle is how long the agent is left alone before its memory is read: it gives memory back twice meanwhile.
	idle = 45 * time.Second
	// system is the namespace of the agent, and agentPods selects it there.
	system    = "istio-system"
	agentPods = "app=istio-cni-node"
)

// lane is a namespace to start pods in.
type lane struct {
	Name, Mode string
}

var lanes = []lane{{"outside", "none"}, {"inside", "ambient"}}

// round is one burst of pods in one lane.
type round struct {
	Lane string
	// Started is from a pod's creation until its container runs, in Kubernetes's seconds; All until the last one does.
	Started []time.Duration
	All     time.Duration
	// Own is how long the agent was at a pod, Captured the same with the wait for the pods before, and Answered with the
	// node proxy's word. Outside the mesh there are none.
	Own, Captured, Answered []time.Duration
	// CPU is the agent's processor time for all of them, from before the first until the last runs.
	CPU time.Duration
	// Load is the machine's load average over a minute at the end.
	Load float64
}

// figures are all that is measured.
type figures struct {
	Pods   int
	Rounds []round
	// Before and Full are the agent's resident memory in bytes, without a pod of this program's, and with fullNode captured.
	Before, Full int
}

func main() {
	pods := flag.Int("pods", 100, "how many pods start at once")
	reps := flag.Int("reps", 3, "how often they do, in each namespace")
	image := flag.String("image", "docker.io/fairlead/testbox:dev", "the pods' image; it is called with the argument sleep")
	out := flag.String("out", "out/bench", "directory for starts.json")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{image: *image}
	all, err := b.run(ctx, *pods, *reps)
	if err == nil {
		err = all.write(filepath.Join(*out, "starts.json"))
	}
	if err == nil {
		err = all.report(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench starts:", err)
		os.Exit(1)
	}
}

// bench is a cluster with one node.
type bench struct {
	image string
	// agent is the name of the agent's pod.
	agent string
}

func (b *bench) run(ctx context.Context, pods, reps int) (all figures, err error) {
	all.Pods = pods
	for _, l := range lanes {
		text := "{apiVersion: v1, kind: Namespace, metadata: {name: " + l.Name + ", labels: {istio.io/dataplane-mode: " + l.Mode + "}}}"
		if _, err := kubectl(ctx, text, "apply", "-f", "-"); err != nil {
			return all, err
		}
	}
	names, err := kubectl(ctx, "", "get", "pods", "-n", system, "-l", agentPods, "-o", "jsonpath={.items[*].metadata.name}")
	if err != nil {
		return all, err
	}
	if b.agent = strings.TrimSpace(names); b.agent == "" || strings.Contains(b.agent, " ") {
		return all, fmt.Errorf("the cluster has the agents %q, want one: bring it up with one node", b.agent)
	}
	if all.Before, err = b.memory(ctx); err != nil {
		return all, err
	}
	for rep := range reps {
		for i := range lanes {
			l := lanes[(rep+i)%len(lanes)]
			fmt.Fprintf(os.Stderr, "round %d of %d, %s the mesh\n", rep+1, reps, l.Name)
			r, err := b.burst(ctx, l, pods)
			if err != nil {
				return all, err
			}
			all.Rounds = append(all.Rounds, r)
		}
	}
	fmt.Fprintf(os.Stderr, "memory with %d pods captured\n", fullNode)
	if err := b.start(ctx, "inside", fullNode); err != nil {
		return all, err
	}
	if all.Full, err = b.memory(ctx); err != nil {
		return all, err
	}
	return all, b.stop(ctx, "inside")
}

// burst starts pods at once, and removes them.
func (b *bench) burst(ctx context.Context, l lane, pods int) (r round, err error) {
	r.Lane = l.Name
	time.Sleep(10 * time.Second) // what was before comes to rest
	before, err := b.metrics(ctx)
	if err != nil {
		return r, err
	}
	began := time.Now()
	if err := b.start(ctx, l.Name, pods); err != nil {
		return r, err
	}
	r.All = time.Since(began)
	after, err := b.metrics(ctx)
	if err != nil {
		return r, err
	}
	r.CPU = time.Duration((after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]) * float64(time.Second))
	if r.Started, err = started(ctx, l.Name); err != nil {
		return r, err
	}
	if err := b.read(ctx, &r, began); err != nil {
		return r, err
	}
	if l.Mode != "none" && len(r.Own) != pods {
		return r, fmt.Errorf("the agent's log tells of %d pods that were captured at their start, want %d", len(r.Own), pods)
	}
	average, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return r, err
	}
	if _, err := fmt.Sscan(string(average), &r.Load); err != nil {
		return r, err
	}
	return r, b.stop(ctx, l.Name)
}

// start makes pods without a controller, whose own pace would be measured too, and waits until all run.
func (b *bench) start(ctx context.Context, namespace string, pods int) error {
	var text strings.Builder
	for i := range pods {
		fmt.Fprintf(&text, "---\n{apiVersion: v1, kind: Pod, metadata: {name: web-%d, namespace: %s}, spec: {terminationGracePeriodSeconds: 0, "+
			"automountServiceAccountToken: false, containers: [{name: web, image: %s, args: [sleep]}]}}\n", i, namespace, b.image)
	}
	if _, err := kubectl(ctx, text.String(), "create", "-f", "-"); err != nil {
		return err
	}
	_, err := kubectl(ctx, "", "wait", "pods", "--all", "-n", namespace, "--for", "condition=Ready", "--timeout", "10m")
	return err
}

func (b *bench) stop(ctx context.Context, namespace string) error {
	_, err := kubectl(ctx, "", "delete", "pods", "--all", "-n", namespace, "--timeout", "5m")
	return err
}

// started is how long each pod of a namespace took until its container ran.
func started(ctx context.Context, namespace string) (all []time.Duration, err error) {
	text, err := kubectl(ctx, "", "get", "pods", "-n", namespace, "-o",
		`jsonpath={range .items[*]}{.metadata.creationTimestamp} {.status.containerStatuses[0].state.running.startedAt}{"\n"}{end}`)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(text) {
		from, to, _ := strings.Cut(strings.TrimSpace(line), " ")
		made, err := time.Parse(time.RFC3339, from)
		if err != nil {
			return nil, err
		}
		runs, err := time.Parse(time.RFC3339, to)
		if err != nil {
			return nil, err
		}
		all = append(all, runs.Sub(made))
	}
	return all, nil
}

// read adds what the agent has logged of a round's pods.
func (b *bench) read(ctx context.Context, r *round, since time.Time) error {
	text, err := kubectl(ctx, "", "logs", "-n", system, b.agent, "--since-time", since.UTC().Format(time.RFC3339))
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		var said struct {
			Msg, Pod                 string
			TS                       float64
			Waited, Redirected, Took float64
		}
		// Lines of other kinds, and those of the round before in the same second, are passed over.
		if json.Unmarshal([]byte(line), &said) != nil || said.Msg != "pod starts in the mesh" || said.TS < float64(since.UnixNano())/1e9 ||
			!strings.HasPrefix(said.Pod, r.Lane+"/") {
			continue
		}
		in := func(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }
		r.Own = append(r.Own, in(said.Redirected-said.Waited))
		r.Captured = append(r.Captured, in(said.Redirected))
		r.Answered = append(r.Answered, in(said.Took))
	}
	return nil
}

// memory is what the agent has resident when it has been idle for a while.
func (b *bench) memory(ctx context.Context) (int, error) {
	time.Sleep(idle)
	m, err := b.metrics(ctx)
	return int(m["process_resident_memory_bytes"]), err
}

// metrics are the agent's that have no labels.
func (b *bench) metrics(ctx context.Context) (map[string]float64, error) {
	text, err := kubectl(ctx, "", "get", "--raw", "/api/v1/namespaces/"+system+"/pods/"+b.agent+":15014/proxy/metrics")
	if err != nil {
		return nil, err
	}
	all := map[string]float64{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if number, err := strconv.ParseFloat(value, 64); err == nil {
			all[name] = number
		}
	}
	if all["process_cpu_seconds_total"] == 0 {
		return nil, errors.New("the agent's metrics do not tell its processor time")
	}
	return all, nil
}

func kubectl(ctx context.Context, input string, arguments ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "kubectl", arguments...)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(arguments, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return string(out), nil
}
