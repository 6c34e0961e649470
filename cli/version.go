package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

type componentVersion struct {
	Component string `json:"component"`
	Image     string `json:"image"`
	Ready     string `json:"ready"`
}

type versions struct {
	Client     string             `json:"client"`
	Components []componentVersion `json:"components,omitempty"`
}

func (s *session) version(version string) *cobra.Command {
	var clientOnly bool
	c := &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this program and of what runs in the cluster",
		Example: "  fairlead version\n  fairlead version --client -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{Client: version}
			t := table{header: []string{"COMPONENT", "VERSION", "READY"}, rows: [][]string{{"fairlead", version, "-"}}}
			if !clientOnly {
				var err error
				if v.Components, err = s.installed(cmd.Context()); err != nil {
					return fmt.Errorf("%w (--client shows this program's version alone)", err)
				}
			}
			for _, p := range v.Components {
				t.rows = append(t.rows, []string{p.Component, p.Image, p.Ready})
			}
			return s.print(v, t)
		},
	}
	s.outputFlag(c)
	c.Flags().BoolVar(&clientOnly, "client", false, "this program only")
	return c
}

// installed lists what the system namespace runs.
func (s *session) installed(ctx context.Context) ([]componentVersion, error) {
	k, err := s.connect()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	deployments, err := k.kubernetes.AppsV1().Deployments(s.system).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list deployments of %s: %w", s.system, err)
	}
	daemonSets, err := k.kubernetes.AppsV1().DaemonSets(s.system).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list daemon sets of %s: %w", s.system, err)
	}
	var all []componentVersion
	for _, d := range deployments.Items {
		all = append(all, componentVersion{d.Name, d.Spec.Template.Spec.Containers[0].Image, fmt.Sprintf("%d/%d", d.Status.ReadyReplicas, d.Status.Replicas)})
	}
	for _, d := range daemonSets.Items {
		all = append(all, componentVersion{d.Name, d.Spec.Template.Spec.Containers[0].Image, fmt.Sprintf("%d/%d", d.Status.NumberReady, d.Status.DesiredNumberScheduled)})
	}
	return all, nil
}
