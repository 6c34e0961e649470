package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
)

// Refuse drops the TCP of a pod, whatever its network namespace is, until Admit. The pod's cgroup is found by its UID,
// after which the kubelet names it. It is idempotent.
func (n *Node) Refuse(uid string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	cgroup, err := n.podCgroup(uid)
	if err != nil {
		return err
	}
	var programs refusePrograms
	spec, err := loadRefuse()
	if err != nil {
		return err
	}
	err = spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		connectMapCounters: n.maps.Counters,
	}})
	if err != nil {
		return fmt.Errorf("load the programs that refuse a pod's traffic: %w", err)
	}
	defer programs.Close()
	return errors.Join(
		ensureCgroupLink(n.path("refused", uid+"-out"), cgroup, ebpf.AttachCGroupInetEgress, programs.RefuseOut),
		ensureCgroupLink(n.path("refused", uid+"-in"), cgroup, ebpf.AttachCGroupInetIngress, programs.RefuseIn),
	)
}

// Admit ends Refuse. It is no error when there was none.
func (n *Node) Admit(uid string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return errors.Join(detach(n.path("refused", uid+"-out")), detach(n.path("refused", uid+"-in")))
}

// Refused lists the UIDs of pods whose traffic is refused.
func (n *Node) Refused() ([]string, error) {
	pins, err := os.ReadDir(n.path("refused"))
	if err != nil {
		return nil, fmt.Errorf("list refused pods: %w", err)
	}
	var uids []string
	for _, pin := range pins {
		if uid, ok := strings.CutSuffix(pin.Name(), "-out"); ok {
			uids = append(uids, uid)
		}
	}
	return uids, nil
}

// podCgroup finds the cgroup of a pod. The kubelet's systemd driver writes underscores in the UID.
func (n *Node) podCgroup(uid string) (found string, err error) {
	names := []string{"pod" + uid, "pod" + strings.ReplaceAll(uid, "-", "_")}
	err = walkCgroups(n.cfg.Cgroup, func(path string, _ uint64) error {
		base := strings.TrimSuffix(filepath.Base(path), ".slice")
		for _, name := range names {
			if strings.HasSuffix(base, name) {
				found = path
				return fs.SkipAll
			}
		}
		return nil
	})
	if err == nil && found == "" {
		err = fmt.Errorf("pod %s has no cgroup below %s", uid, n.cfg.Cgroup)
	}
	return found, err
}
