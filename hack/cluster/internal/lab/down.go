package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/cgroup"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/machine"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/network"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

// Down removes a cluster, whole or half made: processes, namespaces (and with them
// mounts and routes), cgroups, the link to this machine, and its directory.
func (l Lab) Down(name string) error {
	if err := plan.CheckName(name); err != nil {
		return err
	}
	if _, err := os.Stat(l.dir(name)); errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(l.Out, "There is no cluster %s.\n", name)
		return l.sweep()
	}
	unlock, err := l.lock(name)
	if err != nil {
		return err
	}
	err = l.remove(name)
	unlock()
	if err != nil {
		return err
	}
	return l.sweep()
}

func (l Lab) remove(name string) error {
	run := l.dir(name)
	began := time.Now()
	machines, err := filepath.Glob(filepath.Join(run, "*", "pid"))
	if err != nil {
		return err
	}
	var errs []error
	for _, pidFile := range machines {
		errs = append(errs, machine.Stop(machine.Machine{Cluster: name, Name: filepath.Base(filepath.Dir(pidFile)), Run: run}))
	}
	groups, err := cgroup.Discover()
	if err != nil {
		return err
	}
	errs = append(errs, groups.Remove(name))
	if c, err := load(run); err == nil {
		errs = append(errs, network.RemoveHost(c.plan))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("taking down %s (nothing of %s was deleted, try again): %w", name, run, err)
	}
	if err := removeAll(run); err != nil {
		return err
	}
	fmt.Fprintf(l.Out, "Cluster %s is gone (%.1f s).\n", name, time.Since(began).Seconds())
	return nil
}

// removeAll tries for a while: mount namespaces end a moment after their processes.
func removeAll(dir string) error {
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
	}
	return err
}

// sweep removes what all clusters shared, once the last is gone.
func (l Lab) sweep() error {
	unlock, err := l.lock("index")
	if err != nil {
		return err
	}
	last := len(l.Names()) == 0
	if last {
		err = l.sweepShared()
	}
	unlock()
	if last {
		// These fail, as they should, if somebody else has put something there.
		_ = os.Remove(filepath.Join(l.State, "run"))
		_ = os.Remove(l.State)
	}
	return err
}

func (l Lab) sweepShared() error {
	groups, err := cgroup.Discover()
	if err != nil {
		return err
	}
	groups.RemoveRoot()
	return l.restoreInotify()
}

// PowerCut kills a node, every process at once, keeps it off for a while, and
// starts it again with the disk it had.
func (l Lab) PowerCut(name, node string, off time.Duration) error {
	unlock, err := l.lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	c, err := l.cluster(name)
	if err != nil {
		return err
	}
	n, ok := c.plan.Node(node)
	if !ok {
		return fmt.Errorf("cluster %s has no node %q", name, node)
	}
	cp, ok := machine.Find(c.machine(plan.ControlPlane))
	if !ok {
		return fmt.Errorf("the control plane of cluster %s does not run", name)
	}
	if err := machine.Stop(c.machine(node)); err != nil {
		return err
	}
	fmt.Fprintf(l.Out, "%s is off.\n", node)
	time.Sleep(off)
	u := &upper{cluster: c, lab: l, began: time.Now(), cp: cp, self: filepath.Join(c.run, "bin", "cluster")}
	if err := u.startNode(n); err != nil {
		return err
	}
	fmt.Fprintf(l.Out, "%s is on again; its kubelet needs some seconds.\n", node)
	return nil
}
