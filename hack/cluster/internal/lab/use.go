package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/machine"
)

// Env prints shell code that points a shell at the cluster.
func (l Lab) Env(name string) (string, error) {
	c, err := l.cluster(name)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("export CLUSTER=%s\nexport KUBECONFIG=%s\nexport PATH=%s:$PATH\n", quote(name), quote(c.kubeconfig()), quote(c.Tools.Bin)), nil
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Load imports image tars into every node.
func (l Lab) Load(name string, tars []string) error {
	c, err := l.cluster(name)
	if err != nil {
		return err
	}
	for i, t := range tars {
		if tars[i], err = filepath.Abs(t); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	errs := make([]error, len(c.plan.Nodes))
	var wg sync.WaitGroup
	for i, n := range c.plan.Nodes {
		wg.Go(func() {
			for _, t := range tars {
				errs[i] = errors.Join(errs[i], c.importInto(self, n.Name, t))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Fprintf(l.Out, "Loaded %d images into %d nodes.\n", len(tars), len(c.plan.Nodes))
	return nil
}

// importInto gives the tar on standard input: the node does not see every
// directory of this machine.
func (c cluster) importInto(self, node, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	args := append([]string{"exec", "--name", c.Spec.Name, node, "ctr"}, machine.ImportArgs("-")...)
	cmd := exec.Command(self, args...)
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("loading %s into %s: %w: %s", tar, node, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Exec replaces this process by a command in a machine's namespaces and cgroups.
func (l Lab) Exec(name, where string, args []string) error {
	c, err := l.cluster(name)
	if err != nil {
		return err
	}
	argv, err := machine.Enter(c.machine(where), args)
	if err != nil {
		return err
	}
	nsenter, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	// The first of two equal names would win.
	env := slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "PATH=") || strings.HasPrefix(s, "KUBECONFIG=")
	})
	env = append(env, "PATH="+c.Tools.Bin+":"+os.Getenv("PATH"), "KUBECONFIG="+c.kubeconfig())
	return fmt.Errorf("running nsenter: %w", syscall.Exec(nsenter, argv, env))
}

// Status prints a table of all clusters.
func (l Lab) Status() error {
	w := tabwriter.NewWriter(l.Out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "CLUSTER\tAPI SERVER\tFAMILY\tMACHINE\tPID\tADDRESSES\tPODS")
	for _, name := range l.Names() {
		c, err := load(l.dir(name))
		if err != nil {
			fmt.Fprintf(w, "%s\thalf made: hack/cluster.sh down --name %s\n", name, name)
			continue
		}
		api := "not ready"
		if c.answers() {
			api = "ready"
		}
		for _, m := range c.plan.Machines() {
			pid := "off"
			if p, ok := machine.Find(c.machine(m)); ok {
				pid = fmt.Sprint(p.PID)
			}
			addrs, pods := fmt.Sprint(c.plan.ControlPlane), ""
			if n, ok := c.plan.Node(m); ok {
				addrs, pods = fmt.Sprint(n.Addrs), fmt.Sprint(n.PodCIDRs)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, api, c.Spec.IPFamily, m, pid, strings.Trim(addrs, "[]"), strings.Trim(pods, "[]"))
		}
	}
	return w.Flush()
}

// MachineCommand runs the commands by which machines are made (see package
// machine); handled tells whether name was one of them.
func MachineCommand(name string, args []string) (handled bool, err error) {
	if name != machine.StageCommand && name != machine.InitCommand {
		return false, nil
	}
	if len(args) != 3 {
		return true, errors.New("started by up only")
	}
	m := machine.Machine{Cluster: args[0], Name: args[1], Run: args[2]}
	if name == machine.StageCommand {
		return true, machine.Stage(m, os.Stdout)
	}
	c, err := load(m.Run)
	if err != nil {
		return true, err
	}
	goAhead := os.NewFile(3, "go-ahead")
	defer goAhead.Close()
	return true, machine.Init(m, c.plan, c.paths(), goAhead)
}
