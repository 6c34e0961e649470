// Command cluster runs a real Kubernetes on one Linux machine, for tests and for a
// first try: etcd, API server, controllers, and nodes of containerd, kubelet and
// kube-proxy, each in namespaces of its own. hack/cluster.sh builds and calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/build"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/image"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/lab"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/pki"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/runc"
)

const usage = `hack/cluster.sh: a real Kubernetes on this machine, without Docker and without a registry.

  build                       build the programs; up does it by itself
  up                          bring a cluster up
      --name NAME             (lab, or $CLUSTER)   --nodes N (2)
      --ip-family ipv4|dual   (ipv4)               --proxy-mode nftables|iptables (nftables)
      --cni ptp|bridge        (ptp)                --cgroup v1|v2 (what the machine has)
  down [--name NAME|--all]    remove it and all its traces
  status                      all clusters, their machines and addresses
  env                         print KUBECONFIG and PATH, to be evaluated by a shell
  load IMAGE.tar...           import images into every node
  exec NODE CMD...            run a command in a node's namespaces ("control-plane" works too)
  install [ARGS...]           build Fairlead's images, load them, install the charts
  power-cut NODE [--off 0s]   kill every process of a node at once, then start it again
  image -o X.tar -name NAME... -file SRC=/DST... [-link /TO=/LINK] [-dir /DIR] [-env K=V]
        [-user U] [-entrypoint CMD]...
                              write an image tar from files
  pki -dir DIR -ip IP... [-nodes a,b] [-cluster NAME]
                              write a cluster's keys, certificates and kubeconfigs

Every command takes --name, or the cluster's name from $CLUSTER. All but image, pki and build need root.
Programs are cached in ${FAIRLEAD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/fairlead}, clusters live in ${FAIRLEAD_STATE:-/var/lib/fairlead-lab}.

Examples
  hack/cluster.sh up
  eval "$(hack/cluster.sh env)"; kubectl get pods -A
  hack/cluster.sh up --name other --nodes 3 --ip-family dual
  hack/cluster.sh exec node1 ip route
  hack/cluster.sh exec node2 tcpdump -ni eth0 port 15008
  CLUSTER=other hack/cluster.sh down
`

func main() {
	if filepath.Base(os.Args[0]) == lab.NoLimitsName {
		exit(runc.Main(os.Args[1:]))
	}
	if len(os.Args) < 2 || slices.Contains([]string{"help", "-h", "-help", "--help"}, os.Args[1]) {
		fmt.Print(usage)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	exit(dispatch(ctx, os.Args[1], os.Args[2:]))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func dispatch(ctx context.Context, name string, args []string) error {
	unprivileged := map[string]func(context.Context, []string) error{"build": buildTools, "image": writeImage, "pki": writePKI}
	privileged := map[string]func(context.Context, []string) error{
		"up": up, "down": down, "status": status, "env": env, "load": load, "exec": execute, "power-cut": powerCut,
	}
	if handled, err := lab.MachineCommand(name, args); handled {
		return err
	}
	if f, ok := unprivileged[name]; ok {
		return f(ctx, args)
	}
	f, ok := privileged[name]
	if !ok {
		return fmt.Errorf("unknown command %q; hack/cluster.sh --help lists them", name)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: it makes namespaces, cgroups and mounts", name)
	}
	return f(ctx, args)
}

// newLab finds the directories; out is for people.
func newLab(out *os.File) (lab.Lab, error) {
	cache, err := cacheDir()
	if err != nil {
		return lab.Lab{}, err
	}
	state := os.Getenv("FAIRLEAD_STATE")
	if state == "" {
		state = "/var/lib/fairlead-lab"
	}
	for what, dir := range map[string]string{"FAIRLEAD_STATE": state, "the cache": cache} {
		for _, own := range []string{"/run/", "/sys/", "/proc/", "/etc/", "/opt/", "/var/log/"} {
			if strings.HasPrefix(dir+"/", own) {
				return lab.Lab{}, fmt.Errorf("%s is %s, and nodes have a %s of their own; choose another place", what, dir, own)
			}
		}
	}
	source := os.Getenv("FAIRLEAD_CLUSTER_SOURCE")
	if source == "" {
		return lab.Lab{}, errors.New("FAIRLEAD_CLUSTER_SOURCE is not set; call hack/cluster.sh, which sets it")
	}
	return lab.Lab{State: state, Out: out, Builder: build.Builder{Source: filepath.Join(source, "build"), Cache: filepath.Join(cache, "cluster"), Out: out}}, nil
}

func cacheDir() (string, error) {
	if d := os.Getenv("FAIRLEAD_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	return filepath.Join(d, "fairlead"), err
}

// flags has the flag that every command knows.
func flags(command string) (*flag.FlagSet, *string) {
	fs := flag.NewFlagSet(command, flag.ExitOnError)
	fs.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	name := os.Getenv("CLUSTER")
	if name == "" {
		name = "lab"
	}
	return fs, fs.String("name", name, "cluster")
}

func buildTools(ctx context.Context, args []string) error {
	fs, _ := flags("build")
	if err := fs.Parse(args); err != nil {
		return err
	}
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	tools, err := l.Builder.Ensure(ctx)
	if err == nil {
		fmt.Println(tools.Bin)
	}
	return err
}

func up(ctx context.Context, args []string) error {
	fs, name := flags("up")
	spec := plan.Spec{}
	fs.IntVar(&spec.Nodes, "nodes", 2, "")
	fs.StringVar(&spec.IPFamily, "ip-family", "ipv4", "")
	fs.StringVar(&spec.ProxyMode, "proxy-mode", "nftables", "")
	fs.StringVar(&spec.CNI, "cni", "ptp", "")
	fs.StringVar(&spec.Cgroup, "cgroup", "", "")
	if err := parseAll(fs, args); err != nil {
		return err
	}
	spec.Name = *name
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	return l.Up(ctx, spec)
}

func down(_ context.Context, args []string) error {
	fs, name := flags("down")
	all := fs.Bool("all", false, "every cluster")
	if err := parseAll(fs, args); err != nil {
		return err
	}
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	if !*all {
		return l.Down(*name)
	}
	var errs []error
	for _, n := range l.Names() {
		errs = append(errs, l.Down(n))
	}
	return errors.Join(errs...)
}

func status(_ context.Context, args []string) error {
	fs, _ := flags("status")
	if err := parseAll(fs, args); err != nil {
		return err
	}
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	return l.Status()
}

func env(_ context.Context, args []string) error {
	fs, name := flags("env")
	if err := parseAll(fs, args); err != nil {
		return err
	}
	l, err := newLab(os.Stderr)
	if err != nil {
		return err
	}
	s, err := l.Env(*name)
	fmt.Print(s)
	return err
}

func load(_ context.Context, args []string) error {
	fs, name := flags("load")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return errors.New("load: name the image tars")
	}
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	return l.Load(*name, fs.Args())
}

func execute(_ context.Context, args []string) error {
	fs, name := flags("exec")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() < 2 {
		return errors.New("exec: name a node and a command")
	}
	l, err := newLab(os.Stderr)
	if err != nil {
		return err
	}
	return l.Exec(*name, fs.Arg(0), fs.Args()[1:])
}

func powerCut(_ context.Context, args []string) error {
	node := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		node, args = args[0], args[1:]
	}
	fs, name := flags("power-cut")
	off := fs.Duration("off", 0, "how long the node stays off")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if node == "" {
		node = fs.Arg(0)
	}
	if node == "" {
		return errors.New("power-cut: name a node")
	}
	l, err := newLab(os.Stdout)
	if err != nil {
		return err
	}
	return l.PowerCut(*name, node, *off)
}

// parseAll refuses arguments that are no flags, lest a misspelt one be ignored.
func parseAll(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("%s: what is %q?", fs.Name(), fs.Arg(0))
	}
	return nil
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// pairs reads A=B lists into a map from B to A.
func pairs(l list) (map[string]string, error) {
	m := map[string]string{}
	for _, s := range l {
		a, b, ok := strings.Cut(s, "=")
		if !ok || a == "" || b == "" {
			return nil, fmt.Errorf("%q: want A=B", s)
		}
		m[b] = a
	}
	return m, nil
}

func writeImage(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("image", flag.ExitOnError)
	var names, files, links, dirs, envs, entrypoint list
	out, user, arch := fs.String("o", "", ""), fs.String("user", "", ""), fs.String("arch", runtime.GOARCH, "")
	for name, l := range map[string]*list{"name": &names, "file": &files, "link": &links, "dir": &dirs, "env": &envs, "entrypoint": &entrypoint} {
		fs.Var(l, name, "")
	}
	if err := parseAll(fs, args); err != nil {
		return err
	}
	if *out == "" {
		return errors.New("image: -o is missing")
	}
	img := image.Image{Names: names, Dirs: dirs, Env: envs, Entrypoint: entrypoint, User: *user, Arch: *arch}
	var err error
	if img.Files, err = pairs(files); err != nil {
		return err
	}
	if img.Links, err = pairs(links); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(*out), ".image-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if err := errors.Join(img.Write(tmp), tmp.Chmod(0o644), tmp.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", *out, err)
	}
	return os.Rename(tmp.Name(), *out)
}

func writePKI(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("pki", flag.ExitOnError)
	dir, name, nodes := fs.String("dir", "pki", ""), fs.String("cluster", "lab", ""), fs.String("nodes", "node1,node2", "")
	var ips list
	fs.Var(&ips, "ip", "")
	if err := parseAll(fs, args); err != nil {
		return err
	}
	r := pki.Request{Cluster: *name, Nodes: strings.Split(*nodes, ","), Now: time.Now()}
	for _, s := range ips {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		r.Addresses = append(r.Addresses, a)
	}
	if len(r.Addresses) == 0 {
		return errors.New("pki: -ip is missing; the first is where clients reach the API server")
	}
	r.Server = r.Addresses[0]
	files, err := pki.Make(r)
	if err != nil {
		return err
	}
	return pki.Write(*dir, files)
}
