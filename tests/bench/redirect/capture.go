package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

const (
	// startingPods start at once; fullNode is how many the node has in the end.
	startingPods = 100
	fullNode     = 110
	ownGoal      = 20 * time.Millisecond
	memoryGoal   = 25 << 20
)

// captures is what starts of pods at once, and a full node, cost the agent.
type captures struct {
	// Own is how long the agent was at a pod, Captured the same with the wait for the pods before, and Answered from the
	// plugin's request to the answer, with the proxy's word, of a proxy that has nothing to do.
	Own, Captured, Answered []time.Duration
	// CPU is the agent's processor time for a pod.
	CPU time.Duration
	// Resident, Anonymous, Most and Idle are memory in bytes: with all pods captured, mostly, without what is mapped from files,
	// and for a moment; and before there was a pod.
	Resident, Anonymous, Most, Idle int
}

// node is a cni-agent and the pods that it is to capture.
type node struct {
	*world
	dir   string
	agent *exec.Cmd
	pods  []*pod
	own   chan [2]time.Duration
}

// capture starts pods at once, rounds times.
func (w *world) capture(ctx context.Context, binary string, rounds int) (c captures, err error) {
	n := &node{world: w, dir: filepath.Join(w.dir, "capture"), own: make(chan [2]time.Duration, fullNode)}
	if err := n.open(ctx, binary); err != nil {
		return c, err
	}
	if c.Idle, _, err = n.memory(); err != nil {
		return c, err
	}
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "capture: round %d of %d\n", round+1, rounds)
		before, err := n.settled()
		if err != nil {
			return c, err
		}
		answered, err := n.each(ctx, n.pods[:startingPods], plugin.AddPath)
		if err != nil {
			return c, err
		}
		c.Answered = append(c.Answered, answered...)
		for range startingPods {
			took := <-n.own
			c.Own, c.Captured = append(c.Own, took[0]), append(c.Captured, took[1])
		}
		after, err := cpuOf(n.agent.Process.Pid)
		if err != nil {
			return c, err
		}
		c.CPU += (after - before) / time.Duration(rounds*startingPods)
		if round < rounds-1 {
			if _, err := n.each(ctx, n.pods[:startingPods], plugin.DelPath); err != nil {
				return c, err
			}
		}
	}
	if _, err := n.each(ctx, n.pods[startingPods:], plugin.AddPath); err != nil {
		return c, err
	}
	return c, n.atRest(&c)
}

// atRest reads the agent's memory, once a second for a while: it gives memory back when it has been idle for 5 seconds, and each
// 30 seconds it looks at all pods.
func (n *node) atRest(c *captures) error {
	time.Sleep(7 * time.Second)
	if _, err := n.settled(); err != nil {
		return err
	}
	var resident, anonymous []int
	for range 32 {
		all, some, err := n.memory()
		if err != nil {
			return err
		}
		resident, anonymous = append(resident, all), append(anonymous, some)
		time.Sleep(time.Second)
	}
	slices.Sort(resident)
	slices.Sort(anonymous)
	middle := len(resident) / 2
	c.Resident, c.Anonymous, c.Most = resident[middle], anonymous[middle], resident[len(resident)-1]
	return nil
}

// open makes the pods, without capturing them, and starts the agent and a proxy.
func (n *node) open(ctx context.Context, binary string) error {
	objects := filepath.Join(n.dir, "objects")
	if err := os.MkdirAll(objects, 0o755); err != nil {
		return err
	}
	text := "apiVersion: v1\nkind: Namespace\nmetadata: {name: app, labels: {istio.io/dataplane-mode: ambient}}\n"
	for i := range fullNode {
		p, err := n.addPod("capture", byte(100+i))
		if err != nil {
			return err
		}
		n.pods = append(n.pods, p)
		text += fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: web-%d, namespace: app, uid: uid-%d}\n"+
			"spec: {nodeName: node, containers: [{name: c, image: i}]}\n", i, i)
	}
	if err := os.WriteFile(filepath.Join(objects, "all.yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	if err := n.startAgent(binary, objects); err != nil {
		return err
	}
	place := n.pods[0]
	if _, _, _, err := n.start(place, filepath.Join(place.cgroup, "proxy"), "nodeproxy", n.socket("zds")); err != nil {
		return err
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := n.ask(ctx, http.MethodGet, plugin.StatusPath, nil)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("the agent is not ready: %w", err)
		}
	}
	_, err := n.settled()
	return err
}

func (n *node) socket(name string) string { return filepath.Join(n.dir, "run", name+".sock") }

func (n *node) startAgent(binary, objects string) error {
	bpffs, run := filepath.Join(n.dir, "bpf"), filepath.Join(n.dir, "run")
	if err := os.Mkdir(run, 0o755); err != nil {
		return err
	}
	// As /var/run of a node is.
	if err := unix.Mount("tmpfs", run, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	n.later(func() error { return unix.Unmount(run, unix.MNT_DETACH) })
	n.agent = exec.Command(binary, "--node-name", "node", "--config-dir", objects, "--cni-event-socket", n.socket("event"),
		"--zds-socket", n.socket("zds"), "--run-dir", run, "--record", filepath.Join(n.dir, "mesh.json"),
		"--bpffs", bpffs, "--cgroup", n.root, "--host-netns", "/proc/self/ns/net", "--netns-dir", n.dir, "--redirection", "ebpf",
		"--health-addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0")
	n.agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := n.agent.StderrPipe()
	if err != nil {
		return err
	}
	if err := n.agent.Start(); err != nil {
		return err
	}
	n.later(func() error { return redirect.Uninstall(redirect.Config{BPFFS: bpffs, Cgroup: n.root}) })
	n.later(func() error {
		_ = n.agent.Process.Kill() // it may have ended
		_ = n.agent.Wait()         // it was killed
		return nil
	})
	go n.follow(log)
	return nil
}

// follow reads the agent's log, and passes on what is odd in it.
func (n *node) follow(log io.Reader) {
	for lines := bufio.NewScanner(log); lines.Scan(); {
		var line struct {
			Level, Msg string
			Waited     float64
			Redirected float64
		}
		if json.Unmarshal(lines.Bytes(), &line) != nil || line.Level != "info" {
			fmt.Fprintln(os.Stderr, lines.Text())
		}
		if line.Redirected > 0 {
			seconds := float64(time.Second)
			n.own <- [2]time.Duration{time.Duration((line.Redirected - line.Waited) * seconds), time.Duration(line.Redirected * seconds)}
		}
	}
}

// each tells the agent of all pods at once, as their plugins would, and returns how long each took.
func (n *node) each(ctx context.Context, pods []*pod, path string) ([]time.Duration, error) {
	took, errs := make([]time.Duration, len(pods)), make([]error, len(pods))
	var group sync.WaitGroup
	for i, p := range pods {
		number := slices.Index(n.pods, p)
		event := plugin.Event{
			Netns: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.ns.Fd()), PodName: fmt.Sprintf("web-%d", number), PodNamespace: "app",
			PodUID: fmt.Sprintf("uid-%d", number), ContainerID: fmt.Sprintf("container-%d", number),
			IPs: []plugin.IPConfig{{Address: p.addr.String() + "/32"}},
		}
		group.Go(func() {
			start := time.Now()
			errs[i] = n.ask(ctx, http.MethodPost, path, event)
			took[i] = time.Since(start)
		})
	}
	group.Wait()
	return took, errors.Join(errs...)
}

func (n *node) ask(ctx context.Context, method, path string, event any) error {
	body, err := json.Marshal(event)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.socket("event"))
		}}}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, text)
	}
	return err
}

// settled waits until the agent has nothing to do any more, and returns its processor time.
func (n *node) settled() (time.Duration, error) {
	before := time.Duration(-1)
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
		now, err := cpuOf(n.agent.Process.Pid)
		if err != nil || now == before {
			return now, err
		}
		before = now
	}
	return 0, errors.New("the agent does not come to rest")
}

// memory is what the agent has resident, all of it and without what is mapped from files.
func (n *node) memory() (resident, anonymous int, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.agent.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		kib, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch name {
		case "VmRSS":
			resident = kib << 10
		case "RssAnon":
			anonymous = kib << 10
		}
	}
	return resident, anonymous, nil
}

// report prints what capturing costs, and the goals.
func (c captures) report(to io.Writer) error {
	own, captured, answered := slices.Sorted(slices.Values(c.Own)), slices.Sorted(slices.Values(c.Captured)), slices.Sorted(slices.Values(c.Answered))
	mib := func(bytes int) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
	at := func(sorted []time.Duration, percent int) time.Duration {
		return rounded(float64(sorted[(len(sorted)-1)*percent/100]))
	}
	reached := func(ok bool) string {
		if ok {
			return "reached"
		}
		return "not reached"
	}
	table := tabwriter.NewWriter(to, 2, 0, 2, ' ', 0)
	fmt.Fprintf(table, "\n%d pods start at once\tp50\tp99\tgoal: p99\n", startingPods)
	fmt.Fprintf(table, "the agent's time for one\t%v\t%v\t%v, %s\n", at(own, 50), at(own, 99), ownGoal, reached(at(own, 99) <= ownGoal))
	fmt.Fprintf(table, "captured, with the wait for those before\t%v\t%v\t\n", at(captured, 50), at(captured, 99))
	fmt.Fprintf(table, "answered, with the proxy's word\t%v\t%v\t\n", at(answered, 50), at(answered, 99))
	fmt.Fprintf(table, "the agent's CPU for one\t%v\t\t\n", rounded(float64(c.CPU)))
	fmt.Fprintf(table, "\nthe agent's memory\tresident\tof that not from files\tat most\tgoal: resident\n")
	fmt.Fprintf(table, "no pod, just started\t%s\t\t\t\n", mib(c.Idle))
	fmt.Fprintf(table, "%d pods captured\t%s\t%s\t%s\t%s, %s\n", fullNode, mib(c.Resident), mib(c.Anonymous), mib(c.Most), mib(memoryGoal),
		reached(c.Resident <= memoryGoal))
	return table.Flush()
}

// nodeProxy accepts every pod.
func nodeProxy(arguments []string) error {
	client := &zds.Client{Socket: arguments[0], Handler: &agreeing{held: map[string]*os.File{}}, Log: zap.NewNop()}
	return client.Run(context.Background())
}

// agreeing is a proxy that does nothing.
type agreeing struct{ held map[string]*os.File }

func (a *agreeing) Add(_ context.Context, w zds.Workload) error {
	a.held[w.UID] = w.Netns
	_, err := netns.Cookie(w.Netns)
	return err
}

func (a *agreeing) Delete(uid string) error {
	ns := a.held[uid]
	delete(a.held, uid)
	if ns == nil {
		return nil
	}
	return ns.Close()
}

func (a *agreeing) Snapshot(map[string]struct{}) {}
