// Command bench measures what a connection through Fairlead costs beside a direct one, and beside Envoy and Istio's ztunnel
// where their binaries are named: in one run, on one machine, with the same traffic, lane by lane in turns.
//
// Two machines are made of network namespaces (network.go), each lane gets its pods and servers (lane.go) and its proxies
// (ztunnel.go, envoy.go); traffic comes from package load; measure.go takes one figure, report.go and plot.go show them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

// options are those of the command line.
type options struct {
	lanes, tests []string
	reps         int
	duration     time.Duration
	warm         time.Duration
	pin          int
	idle         int
	foreign      float64
	retries      int
	patience     time.Duration
	out          string
	document     string
	ztunnel      string
	env          []string
	hold         bool
}

// world is what a run consists of.
type world struct {
	options options
	dir     string
	group   group
	spawn   *spawner
	cpus    unix.CPUSet
	a, b    *machine
	lanes   []*lane
	absent  []absence
	waited  time.Duration
}

// absence is a lane that could not be.
type absence struct{ Lane, Why string }

func main() {
	if len(os.Args) > 1 && os.Args[1] == "load" {
		exit(load.Main(os.Args[2:]))
	}
	if os.Getenv(insideVariable) == "" {
		os.Exit(enter())
	}
	o, err := parseOptions(os.Args[1:])
	if err != nil {
		exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(bench(ctx, o))
}

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	if !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	os.Exit(1)
}

// insideVariable says that this process is in a mount namespace of its own.
const insideVariable = "FAIRLEAD_BENCH_INSIDE"

// enter runs this program again in a mount namespace of its own: the BPF file systems that it mounts, and with them all
// programs and maps, are gone when it is, however it ends.
func enter() int {
	cmd := exec.Command(selfPath, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: root is needed for network namespaces and eBPF:", err)
		return 1
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	if err := cmd.Wait(); err != nil {
		return 1
	}
	return 0
}

func parseOptions(args []string) (options, error) {
	var o options
	var lanes, names string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&lanes, "lanes", "direct,fairlead,envoy,ztunnel", "lanes, of "+strings.Join(laneNames(), ","))
	f.StringVar(&names, "tests", "bulk1,bulk8,request64,pingpong,connect16,mixed32,node-bulk1,node-pingpong,memory", "tests, of "+strings.Join(append(testNames(), "memory"), ","))
	f.IntVar(&o.reps, "reps", 3, "how often each test is done on each lane")
	f.DurationVar(&o.duration, "duration", 4*time.Second, "how long each takes")
	f.DurationVar(&o.warm, "warm", 500*time.Millisecond, "how long it runs before it counts (not bulk)")
	f.IntVar(&o.pin, "pin", 0, "run everything on so many CPUs (0: all)")
	f.IntVar(&o.idle, "idle", 5000, "idle connections of the memory test")
	f.Float64Var(&o.foreign, "foreign", 0.3, "repeat what was measured while others used more than so many CPUs")
	f.IntVar(&o.retries, "retries", 2, "repeat so often")
	f.DurationVar(&o.patience, "patience", 5*time.Minute, "wait so long in all for others to be quiet")
	f.StringVar(&o.out, "out", "out/bench", "directory for table, plot and raw figures")
	f.StringVar(&o.document, "doc", "", "a document to put the tables into, and the plot beside")
	f.StringVar(&o.ztunnel, "bin", "bin/ztunnel", "Fairlead's ztunnel")
	f.Func("env", "KEY=VALUE for Fairlead's proxies; may be repeated", func(s string) error {
		o.env = append(o.env, s)
		return nil
	})
	f.BoolVar(&o.hold, "hold", false, "set everything up, say where it is, and wait")
	f.Usage = func() {
		fmt.Fprintln(f.Output(), "usage: hack/bench.sh [options]; the peers are named by the variables ENVOY and PEER_ZTUNNEL")
		f.PrintDefaults()
	}
	if err := f.Parse(args); err != nil {
		return o, err
	}
	o.lanes, o.tests = strings.Split(lanes, ","), strings.Split(names, ",")
	for _, name := range o.tests {
		if name != "memory" && !slices.Contains(testNames(), name) {
			return o, fmt.Errorf("no test %q", name)
		}
	}
	for _, name := range o.lanes {
		if !slices.Contains(laneNames(), name) {
			return o, fmt.Errorf("no lane %q", name)
		}
	}
	return o, nil
}

func testNames() []string {
	var names []string
	for _, t := range tests {
		names = append(names, t.name)
	}
	return names
}

// bench is the whole run.
func bench(ctx context.Context, o options) (err error) {
	if err := allowFiles(uint64(2*o.idle + 1000)); err != nil {
		return err
	}
	w := &world{options: o}
	if w.cpus, err = allowedCPUs(); err != nil {
		return err
	}
	if w.dir, err = os.MkdirTemp("", "fairlead-bench-"); err != nil {
		return err
	}
	if w.group, err = newGroups(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.end()) }()
	if o.pin > 0 {
		set := first(w.cpus, o.pin)
		if err := w.group.affinity(set, 0); err != nil {
			return err
		}
	}
	if w.spawn, err = newSpawner(); err != nil {
		return err
	}
	if w.a, w.b, err = newMachines(); err != nil {
		return err
	}
	if err := w.setUp(ctx); err != nil {
		return err
	}
	if o.hold {
		w.describe()
		<-ctx.Done()
		return nil
	}
	figures := w.measureAll(ctx)
	return w.report(figures)
}

// allowFiles lets this process and its children open so many files.
func allowFiles(need uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if limit.Max < need {
		limit = unix.Rlimit{Cur: need, Max: need}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("allow %d open files: %w", need, err)
	}
	return nil
}

// setUp makes the lanes, and sees each carry something.
func (w *world) setUp(ctx context.Context) error {
	for _, name := range w.options.lanes {
		l, why, err := w.makeLane(ctx, name)
		if err != nil {
			return err
		}
		if why != "" {
			w.absent = append(w.absent, absence{name, why})
			progress("lane %-18s %s", name, why)
			continue
		}
		progress("lane %-18s %s; %s", name, l.version, l.suite)
	}
	return nil
}

// describe tells where everything is, for a person who wants to look at a proxy.
func (w *world) describe() {
	fmt.Println("files:", w.dir)
	for _, l := range w.lanes {
		for _, r := range roles {
			p := l.pods[r]
			pid := 0
			if p.server != nil {
				pid = p.server.cmd.Process.Pid
			}
			fmt.Printf("%s: pod %s %s, its server is process %d\n", l.name, r, p.addr, pid)
		}
		for _, p := range l.proxies {
			fmt.Printf("%s: proxy of %v is process %d (nsenter -t %d -n)\n", l.name, p.pods, p.cmd.Process.Pid, p.cmd.Process.Pid)
		}
	}
}

// end takes everything away.
func (w *world) end() error {
	var errs []error
	for _, l := range w.lanes {
		errs = append(errs, l.end())
	}
	return errors.Join(append(errs, w.group.leave(), w.group.remove(), os.RemoveAll(w.dir))...)
}

// figures are what a run has measured.
type figures struct {
	runs   []run
	memory []memory
}

// measureAll does all tests on all lanes, in turns, so that what changes on the machine changes for all.
func (w *world) measureAll(ctx context.Context) figures {
	var f figures
	if slices.Contains(w.options.tests, "memory") {
		for _, l := range w.lanes {
			if len(l.proxies) == 0 || ctx.Err() != nil {
				continue
			}
			m := w.measureMemory(ctx, l, w.options.idle)
			progress("memory %-18s idle %.1f, with %d connections %.1f, after %.1f MiB %s", l.name, m.Idle, m.Connections, m.Open, m.Closed, m.Error)
			f.memory = append(f.memory, m)
		}
	}
	for rep := range w.options.reps {
		for _, t := range tests {
			if !slices.Contains(w.options.tests, t.name) {
				continue
			}
			for i := range w.lanes {
				if ctx.Err() != nil {
					return f
				}
				l := w.lanes[(i+rep)%len(w.lanes)]
				r := w.measure(ctx, t, l, rep)
				progress("%d/%d %-17s %-18s %s", rep+1, w.options.reps, t.name, l.name, describeRun(t, r))
				f.runs = append(f.runs, r)
				if t.load.Kind == "connect" {
					time.Sleep(time.Second) // for sockets in TIME_WAIT and buffered log lines
				}
			}
		}
	}
	return f
}

func describeRun(t test, r run) string {
	if r.Error != "" {
		return "FAILED: " + r.Error
	}
	text := fmt.Sprintf("%9.3f CPU s/%s  %9.2f %s", r.perUnit(t), t.unit, r.Result.Rate/t.rateOf, t.rate)
	if r.Result.P50 > 0 {
		text += fmt.Sprintf("  p50 %.0f p99 %.0f µs", r.Result.P50, r.Result.P99)
	}
	text += fmt.Sprintf("  foreign %.2f", r.Foreign)
	if r.Result.Errors > 0 {
		text += fmt.Sprintf("  %d ERRORS: %s", r.Result.Errors, r.Result.First)
	}
	return text
}

var started = time.Now()

// progress says what happens, with the time since the start.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%4.0fs  %s\n", time.Since(started).Seconds(), fmt.Sprintf(format, args...))
}

// makeLane makes a lane and its proxies and sees it work; why says that it cannot be.
func (w *world) makeLane(ctx context.Context, name string) (l *lane, why string, err error) {
	kind := lanes[slices.Index(laneNames(), name)]
	binary := ""
	if kind.binary != nil {
		if binary, why = kind.binary(w.options); why != "" {
			return nil, why, nil
		}
	}
	l, err = newLane(w, name)
	if err != nil {
		return nil, "", err
	}
	w.lanes = append(w.lanes, l)
	l.about, l.version = kind.about, "no proxy"
	sniffer, err := newSniffer(w.a)
	if err != nil {
		return nil, "", err
	}
	defer sniffer.close()
	if kind.start != nil {
		l.version = kind.version(ctx, binary)
		if err := kind.start(ctx, w, l, binary); err != nil {
			return nil, "", err
		}
	}
	if err := l.smoke(ctx); err != nil {
		return nil, "", err
	}
	l.suite = "no TLS"
	if kind.start != nil {
		if l.suite, err = sniffer.suite(l.pods[remote].addr.As4(), 2*time.Second); err != nil {
			return nil, "", fmt.Errorf("lane %s: %w: it has no tunnel", name, err)
		}
	}
	return l, "", nil
}

// laneKind is one way of setting a lane up.
type laneKind struct {
	name, about string
	// binary finds the proxy's program, or says why there is none.
	binary  func(options) (path, why string)
	version func(ctx context.Context, binary string) string
	start   func(ctx context.Context, w *world, l *lane, binary string) error
}

var lanes = []laneKind{
	{name: "direct", about: "no proxy"},
	{name: "fairlead", about: "this project's ztunnel as installed: redirection by eBPF, access log at level info, metrics",
		binary: ownBinary, version: ownVersion, start: func(ctx context.Context, w *world, l *lane, binary string) error {
			return nodeProxy{binary: binary, env: w.options.env, ebpf: true}.start(ctx, l)
		}},
	{name: "fairlead-rules", about: "this project's ztunnel under Istio's redirection (iptables REDIRECT in the pod)",
		binary: ownBinary, version: ownVersion, start: func(ctx context.Context, w *world, l *lane, binary string) error {
			return nodeProxy{binary: binary, env: w.options.env}.start(ctx, l)
		}},
	{name: "envoy", about: "an Envoy in each pod, as HBONE client and server, access log on",
		binary: namedBy("ENVOY"), version: firstLine("--version"), start: func(ctx context.Context, w *world, l *lane, binary string) error {
			threads := w.cpus.Count()
			if w.options.pin > 0 {
				threads = min(threads, w.options.pin)
			}
			return envoy(ctx, l, binary, threads)
		}},
	{name: "ztunnel", about: "Istio's ztunnel, access log at level info, redirection by iptables REDIRECT in the pod",
		binary: namedBy("PEER_ZTUNNEL"), version: ztunnelVersion, start: func(ctx context.Context, w *world, l *lane, binary string) error {
			authority, err := identity.NewSelfSigned(mesh.DefaultTrustDomain, 0)
			if err != nil {
				return err
			}
			return nodeProxy{binary: binary, authority: authority}.start(ctx, l)
		}},
}

func laneNames() []string {
	var names []string
	for _, l := range lanes {
		names = append(names, l.name)
	}
	return names
}

func ownBinary(o options) (string, string) {
	path, err := filepath.Abs(o.ztunnel)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		return "", "not built: " + err.Error()
	}
	return path, ""
}

func namedBy(variable string) func(options) (string, string) {
	return func(options) (string, string) {
		path := os.Getenv(variable)
		if path == "" {
			return "", "not given (set " + variable + " to its binary)"
		}
		if _, err := os.Stat(path); err != nil {
			return "", "not given: " + variable + ": " + err.Error()
		}
		return path, ""
	}
}

func ownVersion(ctx context.Context, _ string) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty").Output()
	if err != nil {
		return "Fairlead"
	}
	return "Fairlead " + strings.TrimSpace(string(out))
}

// ztunnelVersion is the commit and the cryptography of Istio's ztunnel.
func ztunnelVersion(ctx context.Context, binary string) string {
	line := firstLine("version")(ctx, binary)
	field := func(name string) string {
		_, rest, _ := strings.Cut(line, name+`:"`)
		value, _, _ := strings.Cut(rest, `"`)
		return value
	}
	revision, built := field("GitRevision"), field("CryptoProvider")
	if revision == "" {
		return line
	}
	return "ztunnel " + revision[:min(12, len(revision))] + ", " + built
}

// firstLine asks a program for its version.
func firstLine(argument string) func(context.Context, string) string {
	return func(ctx context.Context, binary string) string {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, binary, argument).Output()
		if err != nil {
			return "version unknown"
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return strings.TrimPrefix(strings.TrimSpace(strings.TrimPrefix(line, binary)), "version: ")
	}
}
