// Package lab (plumbing) brings clusters up and down and works on running ones.
package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/build"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/config"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/machine"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

// Lab is where clusters live on this machine.
type Lab struct {
	State   string // directory; one below run/ per cluster
	Builder build.Builder
	Out     io.Writer // for people
}

// Record is what is kept about a cluster, in cluster.json.
type Record struct {
	Spec  plan.Spec   `json:"spec"`
	Tools build.Tools `json:"tools"`
	Runc  string      `json:"runc"`
}

// cluster is one cluster on disk.
type cluster struct {
	Record
	plan plan.Plan
	run  string
}

const recordFile = "cluster.json"

func (l Lab) dir(name string) string { return filepath.Join(l.State, "run", name) }

func (c cluster) paths() config.Paths {
	return config.Paths{Bin: c.Tools.Bin, Run: c.run, Runc: c.Runc}
}

func (c cluster) machine(name string) machine.Machine {
	return machine.Machine{Cluster: c.Spec.Name, Name: name, Run: c.run}
}

// Kubeconfig of the cluster's administrator.
func (c cluster) kubeconfig() string { return filepath.Join(c.paths().PKI(), "admin.kubeconfig") }

// load reads the record in a cluster's directory.
func load(run string) (cluster, error) {
	b, err := os.ReadFile(filepath.Join(run, recordFile))
	if err != nil {
		return cluster{}, err
	}
	c := cluster{run: run}
	if err := json.Unmarshal(b, &c.Record); err != nil {
		return cluster{}, fmt.Errorf("reading %s: %w", run, err)
	}
	c.plan, err = plan.New(c.Spec)
	return c, err
}

func (c cluster) save() error {
	if err := os.MkdirAll(c.run, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(c.Record, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(c.run, "."+recordFile)
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.run, recordFile))
}

// cluster finds a cluster that was brought up.
func (l Lab) cluster(name string) (cluster, error) {
	if err := plan.CheckName(name); err != nil {
		return cluster{}, err
	}
	c, err := load(l.dir(name))
	if errors.Is(err, os.ErrNotExist) {
		names := l.Names()
		if len(names) == 0 {
			return cluster{}, fmt.Errorf("there is no cluster %q, nor any other; hack/cluster.sh up makes one", name)
		}
		return cluster{}, fmt.Errorf("there is no cluster %q; there is %s (choose by --name or CLUSTER)", name, strings.Join(names, ", "))
	}
	return c, err
}

// Names lists the clusters that have a directory, whole or not.
func (l Lab) Names() []string {
	entries, err := os.ReadDir(filepath.Join(l.State, "run"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// lock takes a lock of the lab; the kernel lets go of it if the command dies. Its
// file goes with the unlocking.
func (l Lab) lock(name string) (unlock func(), err error) {
	dir := filepath.Join(l.State, "run")
	path := filepath.Join(dir, "."+name+".lock")
	for {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if errors.Is(err, os.ErrNotExist) {
			continue // the last cluster's end took the directory away
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			fmt.Fprintln(l.Out, "Waiting for another command on the same cluster.")
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		// Whoever held it has removed the file: the next one locks another.
		held, herr := f.Stat()
		now, nerr := os.Stat(path)
		if herr != nil || nerr != nil || !os.SameFile(held, now) {
			f.Close()
			continue
		}
		return func() {
			_ = os.Remove(path)
			f.Close()
		}, nil
	}
}

// kubectl runs the cluster's own kubectl as its administrator.
func (c cluster) kubectl(stdin io.Reader, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(c.Tools.Bin, "kubectl"), append([]string{"--kubeconfig", c.kubeconfig()}, args...)...)
	// A proxy of this machine's own surroundings does not lead to the cluster.
	cmd.Env = append(os.Environ(), "NO_PROXY=*", "no_proxy=*")
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// tail returns the last lines of a log, indented for reading.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "    (" + err.Error() + ")"
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return "    " + strings.Join(all[max(0, len(all)-lines):], "\n    ")
}
