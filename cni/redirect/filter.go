package redirect

import (
	"errors"
	"fmt"
	"slices"

	cilium "github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filters is bpf.Filters. Its methods act on the network namespace of the handle, the host's.
type filters struct{ host *netlink.Handle }

// guardName is how the guard's filter is found again.
const guardName = "fairlead-guard"

// Ensure makes the interface's queueing discipline where there is none. The kernel exchanges the programs of one filter at
// once.
func (f filters) Ensure(ifindex int, program *cilium.Program) (taken bool, err error) {
	err = f.host.QdiscAdd(clsact(ifindex))
	if errors.Is(err, unix.EEXIST) {
		var ours, others []netlink.Filter
		ours, others, err = f.guardFilters(ifindex)
		taken = len(ours) == 0 && len(others) > 0
	}
	if err != nil || taken {
		return taken, err
	}
	if err := f.host.FilterReplace(guardFilter(ifindex, program)); err != nil {
		return false, fmt.Errorf("add the filter: %w", err)
	}
	return false, nil
}

func (f filters) Has(ifindex int, program *cilium.Program) (bool, error) {
	info, err := program.Info()
	if err != nil {
		return false, fmt.Errorf("identify the guard: %w", err)
	}
	id, _ := info.ID()
	ours, _, err := f.guardFilters(ifindex)
	return err == nil && slices.ContainsFunc(ours, func(have netlink.Filter) bool { return have.(*netlink.BpfFilter).Id == int(id) }), err
}

// Remove leaves the queueing discipline, which may be of use to others, and does nothing by itself: to remove it, the kernel
// would take the interface out of service for a moment, and lose what is sent to the pod.
func (f filters) Remove(ifindex int) error {
	ours, _, err := f.guardFilters(ifindex)
	if err == nil && len(ours) > 0 {
		err = f.host.FilterDel(ours[0])
	}
	if errors.Is(err, unix.ENODEV) || isAbsent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove the filter of interface %d: %w", ifindex, err)
	}
	return nil
}

// guardFilters lists the filters of what arrives over an interface, and others' of what leaves.
func (f filters) guardFilters(ifindex int) (ours, others []netlink.Filter, err error) {
	link := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		listed, err := f.host.FilterList(link, parent)
		if err != nil {
			return nil, nil, fmt.Errorf("list filters of interface %d: %w", ifindex, err)
		}
		for _, one := range listed {
			if program, ok := one.(*netlink.BpfFilter); ok && program.Name == guardName {
				ours = append(ours, one)
			} else {
				others = append(others, one)
			}
		}
	}
	return ours, others, nil
}

func clsact(ifindex int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0),
	}}
}

func guardFilter(ifindex int, program *cilium.Program) netlink.Filter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Fd: program.FD(), Name: guardName, DirectAction: true,
	}
}
