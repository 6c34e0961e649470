package ztunnel

import (
	"errors"
	"fmt"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/fairlead-mesh/fairlead/internal/state"
	"github.com/fairlead-mesh/fairlead/internal/wire"
	"github.com/fairlead-mesh/fairlead/internal/xds"
)

// node is how ztunnel names itself to the control plane.
func node(c Config) (*core.Node, error) {
	ip := ""
	if c.InstanceIP.IsValid() {
		ip = c.InstanceIP.String()
	}
	metadata, err := structpb.NewStruct(map[string]any{
		"NAME": c.PodName, "NAMESPACE": c.PodNamespace, "INSTANCE_IPS": ip, "NODE_NAME": c.NodeName, "CLUSTER_ID": c.ClusterID,
	})
	if err != nil {
		return nil, fmt.Errorf("describe this node: %w", err)
	}
	id := fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.cluster.local", ip, c.PodName, c.PodNamespace, c.PodNamespace)
	return &core.Node{Id: id, Metadata: metadata}, nil
}

// subscribe makes the store follow what the control plane sends. Policies come first, so that no workload is known
// before what protects it.
func subscribe(client *xds.Client, store *state.Store) {
	client.Subscribe(wire.AuthorizationType, xds.HandlerFunc(func(updated []xds.Resource, removed []string) error {
		change := state.Change{RemovedPolicies: removed}
		var errs []error
		for _, r := range updated {
			policy, err := wire.UnpackAuthorization(r.Body)
			if err != nil {
				errs = append(errs, &xds.ResourceError{Name: r.Name, Err: err})
				continue
			}
			change.Policies = append(change.Policies, policy)
		}
		store.Apply(change)
		return errors.Join(errs...)
	}))
	client.Subscribe(wire.AddressType, xds.HandlerFunc(func(updated []xds.Resource, removed []string) error {
		change := state.Change{Removed: removed}
		var errs []error
		for _, r := range updated {
			workload, service, err := wire.UnpackAddress(r.Body)
			switch {
			case err != nil:
				errs = append(errs, &xds.ResourceError{Name: r.Name, Err: err})
			case workload != nil:
				change.Workloads = append(change.Workloads, workload)
			default:
				change.Services = append(change.Services, service)
			}
		}
		store.Apply(change)
		return errors.Join(errs...)
	}))
}
